"""Reading entries of any store inside a kernel: numbers as they are, codes as what they mean.

Columns: a row of `d` numbers is loaded as `BLOCKS` blocks of `WIDE` columns, of which the first
`d / BLOCK` blocks and `BLOCK` columns exist: sizes in registers are powers of two, and a block's
scale needs one load. Native numbers are one block. 4-bit codes are loaded four at a time and split
into four pieces of every fourth column, to be multiplied with every fourth column of the query.

Arguments without an annotation are pointers and tensors of Triton's own.
"""
# mypy: ignore-errors
# Triton compiles these functions from their source; Python's types say nothing about them.

from __future__ import annotations

import triton
import triton.language as tl

NATIVE = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)
PACKED = tl.constexpr(3)


@triton.jit
def column(j, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Column of the stored row at position `j` of a padded row."""
    return (j // WIDE) * BLOCK + j % WIDE


@triton.jit
def exists(j, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Whether that column exists."""
    return (j % WIDE < BLOCK) & (j // WIDE < D // BLOCK)


@triton.jit
def numbers(
    X, row, ok, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr
):
    """`[rows, BLOCKS * WIDE]` as stored, 0 outside."""
    j = tl.arange(0, BLOCKS * WIDE)
    inside = ok[:, None] & exists(j, D, BLOCK, WIDE)[None, :]
    return tl.load(X + row[:, None] * D + column(j, BLOCK, WIDE)[None, :], mask=inside, other=0.0)


@triton.jit
def _words(
    X, row, ok, N: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr
):
    """`[rows, BLOCKS, WIDE]` of rows of `N` blocks of `WORDS` bytes, or pairs of bytes.

    What is outside does not decode to zero, so its scale or query must be zero.
    """
    block, i = tl.arange(0, BLOCKS), tl.arange(0, WIDE)
    at = row[:, None, None] * (N * WORDS) + (block * WORDS)[None, :, None] + i[None, None, :]
    inside = ok[:, None, None] & (block < N)[None, :, None] & (i < WORDS)[None, None, :]
    return tl.load(X + at, mask=inside, other=0)


@triton.jit
def _scaled(bits, zero: tl.constexpr, scale, DTYPE: tl.constexpr):
    """`(code - zero) * scale` as `[rows, columns]`, from codes `[rows, BLOCKS, WIDE]` with an fp16
    exponent put in front: conversions would take longer than reading the codes."""
    x = bits.to(tl.float16, bitcast=True) - tl.full((), zero, tl.float16)  # exact
    x = x.to(DTYPE) * scale.to(DTYPE)
    return tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))


@triton.jit
def _scales(S, row, ok, N: tl.constexpr, BLOCKS: tl.constexpr):
    """`[rows, BLOCKS, 1]` fp16, 0 outside."""
    block = tl.arange(0, BLOCKS)
    inside = ok[:, None] & (block < N)[None, :]
    return tl.load(S + row[:, None] * N + block[None, :], mask=inside, other=0.0)[:, :, None]


@triton.jit
def entries(
    X,
    S,
    row,
    ok,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Rows of a matrix in any store, in `DTYPE`. INT4: four pieces, of columns `4i + piece`;
    otherwise `[rows, columns]` in the first."""
    N: tl.constexpr = D // BLOCK
    if KIND == NATIVE:
        x = numbers(X, row, ok, D, BLOCK, WIDE, BLOCKS).to(DTYPE)
        return x, x, x, x
    elif KIND == INT8:
        codes = _words(X, row, ok, N, BLOCK, WIDE, BLOCKS).to(tl.uint8, bitcast=True)
        scale = _scales(S, row, ok, N, BLOCKS)
        # 0x6400: 1024, and the last bit is 1.
        x = _scaled((codes ^ 0x80).to(tl.uint16) | 0x6400, 1024 + 128, scale, DTYPE)
        return x, x, x, x
    else:
        codes = _words(
            X, row, ok, N, BLOCK // 4, WIDE // 4, BLOCKS
        )  # four codes to a pair of bytes
        scale = _scales(S, row, ok, N, BLOCKS)
        # 0x5400: 64, and the fifth bit from the right is 1.
        x_0 = _scaled((codes & 0x0F) | 0x6400, 1024 + 8, scale, DTYPE)
        x_1 = _scaled((codes & 0xF0) | 0x5400, 64 + 8, scale, DTYPE)
        codes = codes >> 8
        x_2 = _scaled((codes & 0x0F) | 0x6400, 1024 + 8, scale, DTYPE)
        x_3 = _scaled((codes & 0xF0) | 0x5400, 64 + 8, scale, DTYPE)
        return x_0, x_1, x_2, x_3
