"""Codes of 8, 4, 3 or 2 bits in the bytes of a row, and sums that are the same on every device.

A row of `d` codes is made of planes that stand one after another: one of 8, 4 or 2 bits, or for
3 bits one of 2 bits with `code & 3` and one of 1 bit with `code >> 2`. In a plane of `p` bits, with
`w = d·p/8` bytes, bits `p·j` to `p·j + p - 1` of byte `m` belong to column `m + j·w`: each shift
gives a contiguous range of columns. Knows torch; knows nothing of models, files or methods.
"""

from __future__ import annotations

import torch

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""The planes of codes of so many bits, the lowest bits of a code first."""


def multiple(bits: int) -> int:
    """The number of codes in a row has to be a multiple of this, or planes would not end with a
    byte."""
    return 8 // PLANES[bits][-1]


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`codes [N, d]` uint8, each below `2^bits`, as bytes: uint8 `[N, d·bits/8]`.

    Raises ValueError where `d` is not a `multiple`.
    """
    N, d = codes.shape
    if d % multiple(bits):
        raise ValueError(
            f"{bits} bits a number want rows of a multiple of {multiple(bits)}, not {d}"
        )
    planes, shift = [], 0
    for p in PLANES[bits]:
        parts = ((codes >> shift) & (2**p - 1)).view(N, 8 // p, d * p // 8)
        plane = parts[:, 0].clone()
        for j in range(1, 8 // p):
            plane |= parts[:, j] << (p * j)
        planes.append(plane)
        shift += p
    return torch.cat(planes, dim=1)


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """`[N, d]` uint8: the codes that `pack_codes` put in `packed [N, d·bits/8]`."""
    N, width = packed.shape
    d = width * 8 // bits
    codes = torch.zeros((N, d), dtype=torch.uint8, device=packed.device)
    start = shift = 0
    for p in PLANES[bits]:
        w = d * p // 8
        plane = packed[:, start : start + w]
        for j in range(8 // p):
            codes[:, j * w : (j + 1) * w] |= ((plane >> (p * j)) & (2**p - 1)) << shift
        start, shift = start + w, shift + p
    return codes


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension of `x [..., n]`, `n` at least 1, in a fixed order of
    additions, so that it has the same bits on every device; `x` is used up."""
    n = x.shape[-1]
    while n > 1:
        half = n // 2
        x[..., :half] += x[..., n - half : n]
        n -= half
    return x[..., 0]
