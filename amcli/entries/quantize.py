"""Entries in 8 or 4 bits a number: small signed codes in blocks, one scale to a block.

The arithmetic is that of llama.cpp's q8_0 and q4_0: a row is cut into blocks of 32, each with
the scale `max|x| / levels` in fp16, and a number is stored as `round(x / scale)`. Codes are
symmetric, -127 to 127 and -7 to 7 (q4_0 uses -8 too), so that a number and its negative lose the
same. In 4 bits keys are first turned by an orthonormal Hadamard transform, which
spreads a channel that is far larger than its neighbours over all of them (QuaRot, arXiv
2404.00456; such channels are common among keys: KIVI, arXiv 2402.02750).

Dequantised numbers are float32. Every step is one elementwise operation in a fixed order, so the
result has the same bits on every device. Knows torch; knows nothing of models, files or methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from amcli.entries.ragged import RaggedHeads

BLOCK = 32
"""Numbers that share a scale, or the largest divisor of the head dimension below it."""

SCALE_BYTES = 2

_SMALLEST = 2.0**-14
"""The smallest normal fp16. Smaller scales would be rounded so coarsely that rounding a rounded
number could give another one; numbers that call for one are kept to a multiple of this."""
_LARGEST = 65504.0
"""The largest fp16. Numbers that call for a larger scale are cut off."""

# Numbers dequantised at a time when attending: a CPU is fastest in its caches, a GPU in one go.
_UNPACK_ELEMENTS = {"cpu": 1 << 20}
_UNPACK_ELEMENTS_ELSEWHERE = 1 << 24


def block_size(d: int) -> int:
    """Numbers of a row of `d` that share a scale: the largest divisor of `d` up to BLOCK."""
    return next(b for b in range(min(d, BLOCK), 0, -1) if d % b == 0)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of floats `x [..., d]`; its own inverse.

    Over groups of the largest power of two that divides `d`, in natural order. Sums and
    differences of neighbours at distance 1, 2, 4, ..., then one factor.
    """
    d = x.shape[-1]
    n = d & -d
    y = x.detach().contiguous()
    h = 1
    while h < n:
        pairs = y.view(-1, 2, h)
        y = torch.empty_like(y)
        mixed = y.view(-1, 2, h)
        torch.add(pairs[:, 0], pairs[:, 1], out=mixed[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=mixed[:, 1])
        h *= 2
    return y.mul_(n**-0.5) if n > 1 else y


@dataclass(frozen=True)
class Packed:
    """A matrix `[N, d]` as codes and scales.

    codes    int8 `[N, d]`; or uint8 `[N, d/2]`: code + 8, element 2i in the low four bits of byte
             i, element 2i + 1 in the high ones
    scale    float16 `[N, d / block_size(d)]`, positive
    rotated  whether rows went through `hadamard` first
    """

    codes: torch.Tensor
    scale: torch.Tensor
    rotated: bool

    @property
    def store(self) -> str:
        """What made it: a name of `STORES`."""
        return "int8" if self.codes.dtype == torch.int8 else "int4"

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, d)` of the matrix."""
        N, width = self.codes.shape
        return N, width if self.codes.dtype == torch.int8 else 2 * width

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scale))

    def rows(self, which: slice | torch.Tensor) -> Packed:
        """Some rows: views of a slice, copies of those at given indices."""
        return Packed(self.codes[which], self.scale[which], self.rotated)

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        return Packed(self.codes.to(device), self.scale.to(device), self.rotated)

    def unpack(self) -> torch.Tensor:
        """`[N, d]` float32."""
        x = self.stored()
        return hadamard(x) if self.rotated else x

    def stored(self) -> torch.Tensor:
        """`[N, d]` float32 as stored: still transformed, where rows were `rotated`."""
        N, d = self.shape
        if self.codes.dtype == torch.uint8:
            x = self.scale.new_empty((N, d // 2, 2), dtype=torch.float32)
            x[..., 0] = self.codes & 15
            x[..., 1] = self.codes >> 4
            x.sub_(8)
        else:
            x = self.codes.float()
        # A code times an 11-bit significand: exact in float32.
        blocks = x.view(*self.scale.shape, block_size(d))
        return blocks.mul_(self.scale.float().unsqueeze(-1)).view(N, d)


@dataclass(frozen=True)
class QuantizedHeads:
    """`RaggedHeads` whose keys and values are codes; rows and `beta` are as there.

    Entries stay codes in memory and become numbers only while they are attended to.
    Raises ValueError when shapes disagree.
    """

    keys: Packed
    values: Packed
    beta: torch.Tensor | None
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        rows = {sum(self.lengths), self.keys.shape[0], self.values.shape[0]}
        for packed in (self.keys, self.values):
            N, d = packed.shape
            if packed.scale.shape != (N, d // block_size(d)):
                raise ValueError(f"scales {tuple(packed.scale.shape)} for codes of {N} by {d}")
        if self.beta is not None:
            if self.beta.dtype != torch.float32:
                raise ValueError(f"beta must be float32, got {self.beta.dtype}")
            rows.add(self.beta.shape[0])
        if len(rows) != 1 or min(self.lengths, default=0) < 0:
            raise ValueError(f"lengths, keys, values and beta have {sorted(rows)} rows")

    @property
    def key_dim(self) -> int:
        """Numbers of a key."""
        return self.keys.shape[1]

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""
        return self.values.shape[1]

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each head, and the total at the end: `len(lengths) + 1` ints."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases: what the entries cost in memory and on disk."""
        beta = 0 if self.beta is None else self.beta.numel() * self.beta.element_size()
        return self.keys.nbytes + self.values.nbytes + beta

    @property
    def rotated(self) -> bool:
        """Whether `heads` gives transformed keys, which want transformed queries."""
        return self.keys.rotated

    def heads(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """`(keys [t_h, d], values [t_h, dv], beta [t_h] or None)` in head order, float32.

        Keys are as stored: where `rotated`, multiply them with `hadamard(q)` instead of `q`. There
        are far fewer queries than keys. A few heads at a time are dequantised: few steps on short
        ones, bounded memory on long ones.
        """
        device = self.keys.codes.device.type
        room = _UNPACK_ELEMENTS.get(device, _UNPACK_ELEMENTS_ELSEWHERE)
        room //= max(1, self.key_dim + self.value_dim)
        first = 0
        while first < len(self.lengths):
            last = first + 1
            while last < len(self.lengths) and sum(self.lengths[first : last + 1]) <= room:
                last += 1
            rows = slice(self.offsets[first], self.offsets[last])
            yield from RaggedHeads(
                self.keys.rows(rows).stored(),
                self.values.rows(rows).stored(),
                None if self.beta is None else self.beta[rows],
                self.lengths[first:last],
            ).heads()
            first = last

    def unpack(self) -> RaggedHeads:
        """The entries as numbers, float32: bit for bit what they were rounded to."""
        return RaggedHeads(self.keys.unpack(), self.values.unpack(), self.beta, self.lengths)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> QuantizedHeads:
        """The same entries on another device; codes are codes, whatever the `dtype`."""
        beta = None if self.beta is None else self.beta.to(device=device)
        return QuantizedHeads(self.keys.to(device), self.values.to(device), beta, self.lengths)


Entries = RaggedHeads | QuantizedHeads
"""Entries of one layer, as numbers or as codes."""


@dataclass(frozen=True)
class Quantizer:
    """A way to store entries: `bits` a number, 8 or 4; `rotate` turns keys by `hadamard` first.

    `round_keys` and `round_values` give what `pack` will give back, float32 and of any shape
    `[..., d]`; packing a rounded tensor changes nothing more.
    """

    name: str
    bits: int
    rotate: bool

    def round_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys as they will be read back."""
        return self._round(keys, self.rotate)

    def round_values(self, values: torch.Tensor) -> torch.Tensor:
        """Values as they will be read back."""
        return self._round(values, False)

    def pack(self, heads: RaggedHeads) -> QuantizedHeads:
        """The entries as codes. Raises ValueError for NaN or infinity, and for an odd dimension
        in 4 bits."""
        return QuantizedHeads(
            self.quantize(heads.keys, self.rotate),
            self.quantize(heads.values, False),
            heads.beta,
            heads.lengths,
        )

    def entry_bytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of the codes and scales of one key and one value."""
        return sum(
            d * self.bits // 8 + SCALE_BYTES * (d // block_size(d)) for d in (key_dim, value_dim)
        )

    def quantize(self, x: torch.Tensor, rotate: bool) -> Packed:
        """`x [N, d]`, any float dtype, as codes; raises ValueError as `pack`."""
        N, d = x.shape
        if self.bits == 4 and d % 2:
            raise ValueError(f"{self.name} wants an even head dimension, not {d}")
        if not bool(x.isfinite().all()):
            raise ValueError(f"NaN or infinity cannot be stored as {self.name}")
        levels = 2 ** (self.bits - 1) - 1
        y = x.detach().float().clamp(-levels * _LARGEST, levels * _LARGEST)
        y = hadamard(y) if rotate else y
        b = block_size(d)
        y = y.reshape(N, d // b, b)
        scale = (y.abs().amax(-1) / levels).clamp(_SMALLEST, _LARGEST).half()
        y = (y / scale.float().unsqueeze(-1)).round().clamp(-levels, levels)
        codes = y.to(torch.int8).reshape(N, d)
        if self.bits == 4:
            pairs = (codes + 8).to(torch.uint8).view(N, d // 2, 2)
            codes = pairs[..., 0] | (pairs[..., 1] << 4)
        return Packed(codes, scale, rotate)

    def _round(self, x: torch.Tensor, rotate: bool) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return self.quantize(flat, rotate).unpack().reshape(x.shape)


QUANTIZERS = {
    quantizer.name: quantizer
    for quantizer in (Quantizer("int8", 8, rotate=False), Quantizer("int4", 4, rotate=True))
}
"""The ways to store entries besides the model's own dtype."""

NATIVE = "native"
STORES = (NATIVE, *QUANTIZERS)
"""Ways to store entries, by name."""


def quantizer_of(store: str) -> Quantizer | None:
    """The quantizer of that name; None for `native`. Raises ValueError for any other name."""
    if store not in STORES:
        raise ValueError(f"unknown store {store!r}")
    return QUANTIZERS.get(store)
