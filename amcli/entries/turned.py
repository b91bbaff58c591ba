"""Values turned by a Hadamard transform, in blocks of a row with a scale each, halfway levels.

The transform spreads what is far out over all channels, and makes the numbers of a block nearly
normal; symmetric levels suit that. With few bits none is wasted on a level of its own for zero:
for `L = 2^bits - 1`, a number is `scale·(2·code - L)`, exact in float32. Every step is one
elementwise operation in a fixed order, so the result has the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from amcli.entries.catalogue import PACKED
from amcli.entries.matrix import Matrix, UnstorableError, divisor, hadamard
from amcli.entries.planes import pack_codes, total, unpack_codes

BLOCK = 64
"""Most numbers that share a scale; see `block_size`."""

SCALE_BYTES = 2

_SMALLEST = 2.0**-14
"""The smallest scale besides 0, and the smallest normal fp16."""

_LEAST = 2.0**-8
"""Blocks whose scale is a smaller part of the row's largest become 0: turning back and forth in
float32 leaves of a row's large numbers what would change such a block's codes."""

_NARROWER = {
    8: (),
    4: (0.95, 0.9, 0.85),
    3: (0.9, 0.8, 0.7),
    2: (0.9, 0.8, 0.7, 0.6, 0.5),
}
"""Parts of the largest scale that are tried besides it, for each number of bits."""

_ELEMENTS = 1 << 22  # numbers rounded at a time


def block_size(d: int) -> int:
    """How many numbers of a row of `d` share a scale: the largest divisor of `d` up to BLOCK."""
    return divisor(d, BLOCK)


@dataclass(frozen=True)
class Turned(Matrix):
    """A matrix `[N, d]` of values as codes and scales, of rows that went through `hadamard`.

    codes  uint8 `[N, d·bits/8]`, as `planes.pack_codes` makes them
    scale  float16 `[N, d / block_size(d)]`, at least 0
    name   the name of the store, which says how many bits

    Raises ValueError for scales that do not fit the codes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    name: str

    rotated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        N, d = self.shape
        if self.scale.shape != (N, d // block_size(d)):
            raise ValueError(f"scales {tuple(self.scale.shape)} for codes of {N} by {d}")

    @property
    def store(self) -> str:
        """The store it is in."""
        return self.name

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return PACKED[self.name][1]

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, d)` of the matrix."""
        N, width = self.codes.shape
        return N, width * 8 // self.bits

    def parts(self) -> dict[str, torch.Tensor]:
        """Codes and scales."""
        return {"": self.codes, ".scale": self.scale}

    def with_parts(self, parts: Sequence[torch.Tensor]) -> Turned:
        """The same with other codes and scales."""
        codes, scale = parts
        return replace(self, codes=codes, scale=scale)

    def stored(self) -> torch.Tensor:
        """`[N, d]` float32, still transformed."""
        N, d = self.shape
        x = unpack_codes(self.codes, self.bits).float()
        x = x.mul_(2).sub_(2**self.bits - 1).view(*self.scale.shape, block_size(d))
        return x.mul_(self.scale.float().unsqueeze(-1)).view(N, d)


def quantize(x: torch.Tensor, name: str) -> Turned:
    """Values `x [N, d]`, any float dtype, in the store of that name.

    Raises UnstorableError for NaN, infinity and numbers whose scale would not be finite in fp16;
    ValueError where the bits of a row would not end with a byte.
    """
    (N, d), bits = x.shape, PACKED[name][1]
    blocks, b = d // block_size(d), block_size(d)
    scale = torch.empty((N, blocks), dtype=torch.float16, device=x.device)
    bad = torch.zeros(N, dtype=torch.bool, device=x.device)
    codes = torch.empty((N, d), dtype=torch.uint8, device=x.device)
    step = max(1, _ELEMENTS // max(1, d))
    for start in range(0, N, step):
        some = slice(start, start + step)
        y = hadamard(x[some].detach().float()).view(-1, blocks, b)
        scale[some], bad[some] = _scales(y, bits)
        codes[some] = _codes(y, scale[some].float(), bits).view(-1, d)
    if bool(bad.any()):
        raise UnstorableError(
            "NaN, infinity or a value too large for fp16", name, int(bad.int().argmax())
        )
    return Turned(pack_codes(codes, bits), scale, name)


def _scales(y: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales `[n, blocks]` fp16 of least squared error for blocks `y [n, blocks, b]`, and
    whether those of a row are not finite `[n]`."""
    whole = y.abs().amax(-1) / (2**bits - 1)
    scale = whole.half().float().clamp(min=_SMALLEST)
    bad = ~scale.isfinite().all(-1)
    best = _error(y, scale, bits)
    for part in (*_NARROWER[bits], 0.0):  # levels cannot say 0, but a scale can
        other = (whole * part).half().float().clamp(min=_SMALLEST if part else 0.0)
        error = _error(y, other, bits)
        better = error < best
        scale, best = torch.where(better, other, scale), torch.where(better, error, best)
    least = scale.amax(-1, keepdim=True) * _LEAST
    return scale.masked_fill_(scale < least, 0.0).half(), bad


def _codes(y: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes of blocks `y [n, blocks, b]`, uint8; 0 for a scale of 0."""
    L, scale = 2**bits - 1, scale.unsqueeze(-1)
    steps = (y / scale.masked_fill(scale == 0, 1.0)).add_(L).mul_(0.5)
    return steps.round_().clamp_(0, L).to(torch.uint8).masked_fill_(scale == 0, 0)


def _error(y: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Squared error of each block, `[n, blocks]`."""
    levels = _codes(y, scale, bits).float().mul_(2).sub_(2**bits - 1)
    return total((y - levels.mul_(scale.unsqueeze(-1))).square_())
