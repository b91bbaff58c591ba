"""Keys in groups: for each channel of up to 64 consecutive keys of a head, a lowest number and a
step.

Keys have channels that are far from zero and change little from one entry to the next (KIVI, arXiv
2402.02750): codes that start at the lowest number of their channel waste nothing on that. A number
is read as `zero + scale·code`, in float32; the product is exact. A scale is never so small that
rounding `zero` could move a number by half a step, which makes rounding a rounded number change
nothing. Every step is one elementwise operation in a fixed order, so the result has the same bits
on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from amcli.entries.catalogue import PACKED
from amcli.entries.matrix import Matrix, UnstorableError, taken
from amcli.entries.planes import pack_codes, total, unpack_codes

GROUP = 64
"""Most entries of a group."""

SMALLEST = 2.0**-14
"""The smallest scale, and the smallest normal fp16."""

_NARROWER = {8: (), 4: (), 3: (0.9, 0.8), 2: (0.9, 0.8, 0.7, 0.6)}
"""Parts of the range of a channel that are tried besides all of it, for each number of bits: few
codes do better if a few numbers far out are cut off."""

_ELEMENTS = 1 << 22  # numbers rounded at a time


def groups(lengths: Sequence[int]) -> int:
    """Groups of consecutive pieces of these lengths, each of which begins with a group."""
    return sum(-(-t // GROUP) for t in lengths)


def group_sizes(lengths: Sequence[int]) -> torch.Tensor:
    """`[G]` int64 on the CPU: the entries of each group; all but the last of a piece have GROUP."""
    t = torch.tensor(lengths, dtype=torch.int64)
    counts = (t + GROUP - 1) // GROUP
    piece = torch.repeat_interleave(counts)
    before = torch.arange(piece.numel()) - (counts.cumsum(0) - counts)[piece]
    return (t[piece] - GROUP * before).clamp(max=GROUP)


def group_of_row(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """`[N]` int64: the group that each row belongs to. Counted on the device: a copy to it would
    wait, and nothing that waits can be part of a captured decode step."""
    found, first = [torch.empty(0, dtype=torch.int64, device=device)], 0
    for t in lengths:
        place = torch.arange(t, device=device)
        found.append(place.div_(GROUP, rounding_mode="floor").add_(first))
        first += groups([t])
    return torch.cat(found)


@dataclass(frozen=True)
class Grouped(Matrix):
    """A matrix `[N, d]` of keys as codes, with a zero and a scale for each group and channel.

    codes  uint8 `[N, d·bits/8]`, as `planes.pack_codes` makes them
    scale  float16 `[G, d]`, positive
    zero   float16 `[G, d]`
    name   the name of the store, which says how many bits
    runs   lengths of consecutive pieces, each of which begins with a group; normally those of the
           heads. A head that was joined from several contexts has a piece for each

    Raises ValueError for scales or zeros that do not fit codes and runs.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    name: str
    runs: tuple[int, ...]

    def __post_init__(self) -> None:
        (N, d), G = self.shape, groups(self.runs)
        if sum(self.runs) != N:
            raise ValueError(f"runs of {sum(self.runs)} rows for codes of {N}")
        for x in (self.scale, self.zero):
            if x.shape != (G, d):
                raise ValueError(f"scales or zeros {tuple(x.shape)} for {G} groups of {d} channels")

    @property
    def store(self) -> str:
        """The store it is in."""
        return self.name

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return PACKED[self.name][0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, d)` of the matrix."""
        N, width = self.codes.shape
        return N, width * 8 // self.bits

    def parts(self) -> dict[str, torch.Tensor]:
        """Codes, scales and zeros."""
        return {"": self.codes, ".scale": self.scale, ".zero": self.zero}

    def with_parts(self, parts: Sequence[torch.Tensor]) -> Grouped:
        """The same runs with other codes, scales and zeros."""
        codes, scale, zero = parts
        return replace(self, codes=codes, scale=scale, zero=zero)

    def stored(self) -> torch.Tensor:
        """`[N, d]` float32."""
        group = group_of_row(self.runs, self.device)
        x = unpack_codes(self.codes, self.bits).float()
        return x.mul_(self.scale.float()[group]).add_(self.zero.float()[group])

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether groups begin just where heads of these lengths begin, and every 64 rows after."""
        return groups(self.runs) == groups(lengths)

    def rows(self, which: Sequence[slice]) -> Grouped:
        """Whole runs. Raises ValueError for a slice that begins or ends within one."""
        starts = list(accumulate(self.runs, initial=0))
        firsts = list(accumulate((groups([t]) for t in self.runs), initial=0))
        run_at = {start: run for run, start in enumerate(starts)}
        rows, some = [], []
        runs: list[int] = []
        for part in which:
            first, end, _ = part.indices(starts[-1])
            if first not in run_at or end not in run_at:
                raise ValueError(f"rows {first} to {end} are not whole heads")
            i, j = run_at[first], run_at[max(first, end)]
            rows.append(slice(first, end))
            some.append(slice(firsts[i], firsts[j]))
            runs += self.runs[i:j]
        codes, scale, zero = (
            taken(self.codes, rows),
            taken(self.scale, some),
            taken(self.zero, some),
        )
        return replace(self, codes=codes, scale=scale, zero=zero, runs=tuple(runs))

    @classmethod
    def cat(cls, matrices: Sequence[Grouped]) -> Grouped:
        """The rows of matrices of one `kind`, in their own groups; a single one as it is."""
        first, *others = matrices
        if not others:
            return first
        codes, scale, zero = (
            torch.cat(column)
            for column in zip(*(x.parts().values() for x in matrices), strict=True)
        )
        runs = tuple(t for x in matrices for t in x.runs)
        return replace(first, codes=codes, scale=scale, zero=zero, runs=runs)


def quantize(x: torch.Tensor, lengths: Sequence[int], name: str) -> Grouped:
    """Keys `x [N, d]` of heads of these lengths, any float dtype, in the store of that name.

    Raises UnstorableError for NaN, infinity and numbers whose zero or scale would not be finite in
    fp16; ValueError where the bits of a row would not end with a byte.
    """
    d, bits = x.shape[1], PACKED[name][0]
    sizes = group_sizes(lengths)
    first, place = sizes.cumsum(0) - sizes, torch.arange(GROUP)
    # The last row of a group stands in for those it lacks: they change neither its range nor,
    # left out of the sum, its error.
    rows = first[:, None] + torch.minimum(place, sizes[:, None] - 1)
    real = place < sizes[:, None]
    kept = real.view(-1).nonzero().squeeze(1).to(x.device)
    rows, real, G = rows.to(x.device), real.to(x.device), len(sizes)
    zero = torch.empty((G, d), dtype=torch.float16, device=x.device)
    scale, bad = torch.empty_like(zero), torch.zeros(G, dtype=torch.bool, device=x.device)
    codes = torch.empty((G, GROUP, d), dtype=torch.uint8, device=x.device)
    step = max(1, _ELEMENTS // (GROUP * max(1, d)))
    for start in range(0, G, step):
        some = slice(start, start + step)
        y = x.detach()[rows[some]].float()
        zero[some], scale[some], bad[some] = _ranges(y, real[some], bits)
        codes[some] = _codes(y, zero[some].float(), scale[some].float(), bits)
    if bool(bad.any()):
        row = int(first[int(bad.int().argmax())])
        raise UnstorableError("NaN, infinity or a key too large for fp16", name, row)
    packed = pack_codes(codes.view(-1, d)[kept], bits)
    return Grouped(packed, scale, zero, name, tuple(lengths))


def _ranges(
    y: torch.Tensor, real: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zero and scale `[g, d]` fp16 of groups `y [g, GROUP, d]`, and whether one of a group is not
    finite `[g]`. Part of the range where that has less squared error, over `real [g, GROUP]`."""
    low, high = y.amin(1), y.amax(1)
    zero, scale = _range(low, high, bits)
    bad = ~(zero.isfinite() & scale.isfinite()).all(1)
    if not _NARROWER[bits]:
        return zero, scale, bad
    best = _error(y, real, zero, scale, bits)
    for part in _NARROWER[bits]:
        middle, reach = (low + high) * 0.5, (high - low) * (0.5 * part)
        other_zero, other_scale = _range(middle - reach, middle + reach, bits)
        error = _error(y, real, other_zero, other_scale, bits)
        better = error < best
        zero, scale = torch.where(better, other_zero, zero), torch.where(better, other_scale, scale)
        best = torch.where(better, error, best)
    return zero, scale, bad


def _range(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero and scale fp16 for numbers from `low` to `high`, float32."""
    zero = low.half() + 0.0  # no -0
    scale = ((high - zero.float()) / (2**bits - 1)).half().float()
    # 2^(e - 10) where |zero| is in [2^(e - 1), 2^e): two of its last place, by its exponent field.
    field = (zero.view(torch.int16).int() & 0x7C00) >> 10
    floor = ((field + 103) << 23).view(torch.float32)
    return zero, torch.maximum(scale, floor).clamp(min=SMALLEST).half()


def _codes(y: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes of `y [g, GROUP, d]`, uint8."""
    steps = (y - zero.unsqueeze(1)) / scale.unsqueeze(1)
    return steps.round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def _error(
    y: torch.Tensor, real: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """`[g, d]`: squared error of groups, over their `real [g, GROUP]` rows."""
    zero, scale = zero.float(), scale.float()
    read = _codes(y, zero, scale, bits).float() * scale.unsqueeze(1) + zero.unsqueeze(1)
    off = (y - read).square_().mul_(real.unsqueeze(2))
    return total(off.transpose(1, 2))
