"""Entries in 8 or 4 bits per number: small signed codes in blocks, one scale per block.

The arithmetic is that of llama.cpp's q8_0 and q4_0: a row is cut into blocks of 32, each with
the scale `max|x| / levels` in fp16, and a number is stored as `round(x / scale)`. Codes are
symmetric, -127 to 127 and -7 to 7 (q4_0 uses -8 too), so that a number and its negative lose the
same. For 4 bits, keys first go through an orthonormal Hadamard transform, which
spreads a channel that is far larger than its neighbours over all of them (QuaRot, arXiv
2404.00456; such channels are common among keys: KIVI, arXiv 2402.02750).

Dequantised numbers are float32. Every step is one elementwise operation in a fixed order, so the
result has the same bits on every device. Knows torch; knows nothing of models, files or methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from amcli.entries.matrix import Matrix, UnstorableError, divisor, hadamard
from amcli.entries.stores import Quantizer

BLOCK = 32
"""Most numbers that share a scale; see `block_size`."""

SCALE_BYTES = 2

_SMALLEST = 2.0**-14
"""The smallest normal fp16. Smaller scales would be rounded so coarsely that rounding a rounded
number could change it again; numbers that need one become multiples of this."""
_LARGEST = 65504.0
"""The largest fp16. Numbers that need a larger scale are clipped."""


def block_size(d: int) -> int:
    """How many numbers of a row of `d` share a scale: the largest divisor of `d` up to BLOCK."""
    return divisor(d, BLOCK)


@dataclass(frozen=True)
class Blocks(Matrix):
    """A matrix `[N, d]` as codes and scales.

    codes    int8 `[N, d]`; or uint8 `[N, d/2]`: code + 8, element 2i in the low four bits of byte
             i, element 2i + 1 in the high ones
    scale    float16 `[N, d / block_size(d)]`, positive
    rotated  whether rows went through `hadamard` first

    Raises ValueError for scales that do not fit the codes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    rotated: bool = False

    def __post_init__(self) -> None:
        N, d = self.shape
        if self.scale.shape != (N, d // block_size(d)):
            raise ValueError(f"scales {tuple(self.scale.shape)} for codes of {N} by {d}")

    @property
    def store(self) -> str:
        """`int8` or `int4`."""
        return "int8" if self.codes.dtype == torch.int8 else "int4"

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, d)` of the matrix."""
        N, width = self.codes.shape
        return N, width if self.codes.dtype == torch.int8 else 2 * width

    def parts(self) -> dict[str, torch.Tensor]:
        """Codes and scales."""
        return {"": self.codes, ".scale": self.scale}

    def with_parts(self, parts: Sequence[torch.Tensor]) -> Blocks:
        """The same with other codes and scales."""
        codes, scale = parts
        return Blocks(codes, scale, self.rotated)

    def stored(self) -> torch.Tensor:
        """`[N, d]` float32 as stored: still transformed if rows were `rotated`."""
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
class BlockQuantizer(Quantizer):
    """`bits` per number, 8 or 4; `rotate` passes keys through `hadamard` first."""

    name: str
    bits: int
    rotate: bool

    @property
    def multiples(self) -> tuple[int, int]:
        """2 for 4 bits, as two codes make a byte; else 1."""
        return 8 // self.bits, 8 // self.bits

    def keys(self, x: torch.Tensor, lengths: tuple[int, ...]) -> Blocks:
        """Keys as codes."""
        return self.quantize(x, self.rotate)

    def values(self, x: torch.Tensor, lengths: tuple[int, ...]) -> Blocks:
        """Values as codes."""
        return self.quantize(x, False)

    def read_keys(self, parts: Mapping[str, torch.Tensor], lengths: tuple[int, ...]) -> Blocks:
        """Keys as codes; files do not say whether they were transformed, the store does."""
        return Blocks(parts[""], parts[".scale"], self.rotate)

    def read_values(self, parts: Mapping[str, torch.Tensor], lengths: tuple[int, ...]) -> Blocks:
        """Values as codes."""
        return Blocks(parts[""], parts[".scale"], False)

    def entry_bytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of the codes and scales of one key and one value."""
        return sum(
            d * self.bits // 8 + SCALE_BYTES * (d // block_size(d)) for d in (key_dim, value_dim)
        )

    def quantize(self, x: torch.Tensor, rotate: bool) -> Blocks:
        """`x [N, d]`, any float dtype, as codes. Raises ValueError as a `Quantizer` does."""
        N, d = x.shape
        if self.bits == 4 and d % 2:
            raise ValueError(f"{self.name} wants an even head dimension, not {d}")
        bad = ~x.isfinite().all(-1)
        if bool(bad.any()):
            raise UnstorableError("NaN or infinity", self.name, int(bad.int().argmax()))
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
        return Blocks(codes, scale, rotate)
