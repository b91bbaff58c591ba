"""The part of `device.partial` that reads the stores `k{K}v{V}`; their bytes: `entries.planes`.

Codes are read as words of `UNIT` bytes, 1 or 2. The codes at one place of the words are a *piece*,
of every `UNIT`th column of a range, and multiplied by itself.

Arguments without an annotation are pointers, integers and tensors of Triton's own.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton compiles these functions from their source; Python's types say nothing about them, and it
# does not know starred tuples.

from __future__ import annotations

import triton
import triton.language as tl

from amcli.entries import grouped
from amcli.kernels.softmax import INF, LOG2E, logits, weigh

GROUP = tl.constexpr(grouped.GROUP)
UP = tl.constexpr(16.0)  # keeps values times their scales normal, and they still fit


@triton.jit
def _words(
    X,
    row,
    ok,
    BITS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`[rows, WIDE]`: words `FIRST` to `FIRST + COUNT` of the first plane; for 3 bits also the bits
    of the second plane for the same columns."""
    i = FIRST + tl.arange(0, WIDE)
    inside = ok[:, None] & (i < FIRST + COUNT)[None, :]
    at = X + row[:, None] * (D * BITS // 8 // UNIT)
    low = tl.load(at + i[None, :], mask=inside, other=0).to(tl.uint16)
    high = low
    if BITS == 3:
        # Of a word of the second plane, the even bits belong to the first half of the words of the
        # first plane, and the odd ones to the second.
        HALF: tl.constexpr = D // 8 // UNIT
        at += 2 * HALF
        even = tl.load(at + i[None, :], mask=inside & (i < HALF)[None, :], other=0)
        odd = tl.load(at + (i - HALF)[None, :], mask=inside & (i >= HALF)[None, :], other=0)
        high = even.to(tl.uint16) | (odd.to(tl.uint16) >> 1)
    return low, high


@triton.jit
def _codes(low, high, BITS: tl.constexpr, AT: tl.constexpr, BYTE: tl.constexpr):
    """The codes at bit `AT` of one byte of the words, where they are, and nothing else."""
    x = low >> 8 if BYTE else low
    if BITS == 3:
        y = high >> 6 if BYTE else high << 2
        x = (x & (3 << AT)) | (y & (4 << AT))
    else:
        x = x & (((1 << BITS) - 1) << AT)
    return x


# Codes become fp16 by their bits: conversions would take longer than reading them.


@triton.jit
def _steps(codes, AT: tl.constexpr):
    """Codes at bit `AT` as numbers, in fp16: with an exponent in front by which bit `AT` is 1."""
    x = (codes | ((25 - AT) << 10)).to(tl.float16, bitcast=True)
    return x - tl.full((), 1 << (10 - AT), tl.float16)  # exact


@triton.jit
def _levels(codes, BITS: tl.constexpr, AT: tl.constexpr):
    """`(code - (2^BITS - 1) / 2) * 2^(AT - 9)` in fp16, for codes at bit `AT`: as they are, they
    are denormal numbers, and this is one operation, exact."""
    half = ((1 << BITS) - 1) / 2 * (1 << AT) / (1 << 9)
    x = codes.to(tl.float16, bitcast=True) * tl.full((), 1 << 15, tl.float16)
    return x - tl.full((), half, tl.float16)


@triton.jit
def _halves(X, ok):
    """Two numbers in fp16 that lie side by side and are loaded as one, 0 outside."""
    pair = tl.load(X, mask=ok, other=0)
    low, high = (pair & 0xFFFF).to(tl.uint16), (pair >> 16).to(tl.uint16)
    return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)


@triton.jit
def _channels(X, ok, UNIT: tl.constexpr):
    """Scales or zeros of the channels of the `UNIT` pieces of a range."""
    if UNIT == 2:
        return _halves(X, ok)
    else:
        return (tl.load(X, mask=ok, other=0.0),)


@triton.jit
def _scales(S, row, ok, BLOCKS: tl.constexpr):
    """Scales of values, for each block of columns; an even number are stored two by two."""
    found = ()
    if BLOCKS % 2:
        for block in tl.static_range(BLOCKS):
            found = found + (tl.load(S + row * BLOCKS + block, mask=ok, other=0.0),)
    else:
        for pair in tl.static_range(BLOCKS // 2):
            found = found + _halves(S + row * (BLOCKS // 2) + pair, ok)
    return found


@triton.jit
def _values(
    low,
    high,
    scales,
    BITS: tl.constexpr,
    RANGE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    OVER: tl.constexpr,
    BYTE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Values of a piece, `2^(8 - AT) / UP` times too small: of one byte of words that begin at
    column `FIRST` of the range number `OVER`."""
    AT: tl.constexpr = OVER * (2 if BITS == 3 else BITS)
    scale = scales[(OVER * RANGE + FIRST) // BLOCK] * tl.full((), UP, tl.float16)
    levels = _levels(_codes(low, high, BITS, AT, BYTE == 1), BITS, AT)
    return levels.to(DTYPE) * scale.to(DTYPE)[:, None]


@triton.jit
def packed_tile(
    pid,
    blocks,
    ASK,
    PK,
    PKS,
    PKZ,
    PV,
    PVS,
    BETA,
    TILES,
    ORDER,
    OUT,
    LSE,
    scale,
    softcap,
    gm,
    H,
    HAS_BETA: tl.constexpr,
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    VBITS: tl.constexpr,
    DV: tl.constexpr,
    VUNIT: tl.constexpr,
    VWIDE: tl.constexpr,
    VBLOCK: tl.constexpr,
    VPARTS: tl.constexpr,
):
    """One block of the rows that see one tile of entries; its result is turned, as values are.

    A step reads keys of one group. Values are read in `VPARTS` parts, so that a piece lies within a
    block of `VBLOCK` columns, which share a scale. `WIDE`, `VWIDE`: words of a part, padded."""
    entry = TILES + (pid // blocks) * 8
    first, count, h = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    slot, order, readers = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    first_group = tl.load(entry + 6)
    r = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    seen = r < readers * gm
    if (pid % blocks) * ROWS < readers * gm:
        b = tl.load(ORDER + order + r // gm, mask=seen, other=0)
        q_row = ((b * H + h) * gm + r % gm).to(tl.int64)
        HALF: tl.constexpr = ASK.dtype.element_ty != tl.float32
        DTYPE: tl.constexpr = tl.float16 if HALF else tl.float32
        PLANE: tl.constexpr = 2 if BITS == 3 else BITS
        RANGE: tl.constexpr = D * PLANE // 8  # columns
        VPLANE: tl.constexpr = 2 if VBITS == 3 else VBITS
        VRANGE: tl.constexpr = DV * VPLANE // 8
        VPART: tl.constexpr = VRANGE // VPARTS
        VPIECES: tl.constexpr = VUNIT * 8 // VPLANE
        # With 16 columns of values at a time, four warps would all do the same, for keys too. And
        # scales that are not loaded two by two are better spread over the warps.
        ALONE: tl.constexpr = VWIDE > 16 and DV // VBLOCK % 2 == 0
        PAIR: tl.constexpr = 1 if ALONE or VPIECES == 1 else 2  # pieces side by side

        i = tl.arange(0, WIDE)
        exists = i < RANGE // UNIT
        asked = ()
        largest = tl.zeros((ROWS,), tl.float32)
        for piece in tl.static_range(UNIT * 8 // PLANE):
            c = piece // UNIT * RANGE + piece % UNIT + UNIT * i
            asking = tl.load(
                ASK + q_row[:, None] * D + c[None, :],
                mask=seen[:, None] & exists[None, :],
                other=0.0,
            ).to(tl.float32)
            asked = asked + (asking,)
            largest = tl.maximum(largest, tl.max(tl.abs(asking), 1))
        largest = tl.where(largest > 0.0, largest, 1.0)
        if not HALF:
            largest = tl.full((ROWS,), 1.0, tl.float32)
        # Keys fit fp16; queries of any size do after division.
        q = ()
        for piece in tl.static_range(UNIT * 8 // PLANE):
            q = q + ((asked[piece] / largest[:, None]).to(DTYPE),)
        logit_scale = scale * largest

        top = tl.full((ROWS,), -INF, tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        acc = ()
        for _ in tl.static_range(VPARTS * VPIECES // PAIR):
            acc = acc + (tl.zeros((ROWS, PAIR * VWIDE), tl.float32),)
        for j in tl.range(0, count, KEYS, num_stages=STAGES):
            n = j + tl.arange(0, KEYS)
            ok = n < count
            row = (first + n).to(tl.int64)
            group = (first_group + j // GROUP).to(tl.int64) * (D // UNIT)
            scales = _scales(PVS, row, ok, DV // VBLOCK)  # early: some take their time
            low, high = _words(PK, row, ok, BITS, D, UNIT, 0, RANGE // UNIT, WIDE)
            dots = tl.zeros((ROWS, KEYS), tl.float32)
            for over in tl.static_range(8 // PLANE):
                at = group + over * (RANGE // UNIT) + i
                steps = _channels(PKS + at, exists, UNIT)
                zeros = _channels(PKZ + at, exists, UNIT)
                for byte in tl.static_range(UNIT):
                    step, zero = steps[byte].to(DTYPE), zeros[byte].to(DTYPE)
                    codes = _codes(low, high, BITS, over * PLANE, byte == 1)
                    k = _steps(codes, over * PLANE).to(DTYPE) * step[None, :] + zero[None, :]
                    dots = tl.dot(q[over * UNIT + byte], tl.trans(k), dots, input_precision="ieee")
            s = logits(dots, logit_scale[:, None], softcap, CAP)
            if HAS_BETA:
                s += (tl.load(BETA + row, mask=ok, other=0.0) * LOG2E)[None, :]
            s = tl.where(ok[None, :], s, -INF)
            p, shrink, top, mass = weigh(s, top, mass)
            p, shrink = p.to(DTYPE), shrink[:, None]
            # All pieces first: a product may still be read from while the next piece is made.
            pieces = ()
            for part in tl.static_range(VPARTS):
                low, high = _words(
                    PV, row, ok, VBITS, DV, VUNIT, part * (VPART // VUNIT), VPART // VUNIT, VWIDE
                )
                for piece in tl.static_range(0, VPIECES, PAIR):
                    v = _values(
                        low, high, scales, VBITS, VRANGE, part * VPART, VBLOCK,
                        piece // VUNIT, piece % VUNIT, DTYPE,
                    )  # fmt: skip
                    if PAIR == 2:
                        w = _values(
                            low, high, scales, VBITS, VRANGE, part * VPART, VBLOCK,
                            (piece + 1) // VUNIT, (piece + 1) % VUNIT, DTYPE,
                        )  # fmt: skip
                        v = tl.interleave(v, w)
                    pieces = pieces + (v,)
            new = ()
            for nth in tl.static_range(VPARTS * VPIECES // PAIR):
                new = new + (tl.dot(p, pieces[nth], acc[nth] * shrink, input_precision="ieee"),)
            acc = new

        some = mass > 0.0
        by = (2 << 9) / UP / tl.where(some, mass, 1.0)
        lse = tl.where(some, top + tl.log2(tl.where(some, mass, 1.0)), -INF)
        out_row = slot.to(tl.int64) * gm + r
        tl.store(LSE + out_row, lse, mask=seen)
        i, second = tl.arange(0, PAIR * VWIDE) // PAIR, tl.arange(0, PAIR * VWIDE) % PAIR
        for part in tl.static_range(VPARTS):
            for piece in tl.static_range(0, VPIECES, PAIR):
                over = (piece + second) // VUNIT
                c = over * VRANGE + part * VPART + (piece + second) % VUNIT + VUNIT * i
                high_by = (1 << (VPLANE * over)).to(tl.float32)
                x = acc[(part * VPIECES + piece) // PAIR] * by[:, None] / high_by[None, :]
                inside = seen[:, None] & (i < VPART // VUNIT)[None, :]
                tl.store(OUT + out_row[:, None] * DV + c[None, :], x, mask=inside)
