"""The two Triton kernels: `partial`, attention of some query rows over one tile of keys, and
`reduce`, which joins what a row got from its tiles.

Rows: a query row of KV head `h` in batch row `b` is `within = (query head in the group) * m +
(new token)`, of `gm` in all; its place in `Q [B, Hq, m, d]` is `(b * H + h) * gm + within`.

A tile's result is its softmax output and the base-2 log-sum-exp of its logits; two results join
by their log-sum-exps. Logits are kept in base 2 because that is what the hardware exponentiates.

Columns: a row of `d` numbers is loaded as `BLOCKS` blocks of `WIDE` columns, of which the first
`d / BLOCK` blocks and `BLOCK` columns exist: powers of two in registers, and a block's scale needs
one load. Native numbers are one block. 4-bit keys are loaded in two halves, the low and the high
bits of each byte, and the query's even and odd columns meet them.

Arguments without an annotation are pointers, integers and tensors of Triton's own.
"""
# mypy: ignore-errors
# Triton compiles these functions from their source; Python's types say nothing about them.

from __future__ import annotations

import triton
import triton.language as tl

NATIVE = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)

_LOG2E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _column(j, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Column of the stored row that position `j` of a padded row holds."""
    return (j // WIDE) * BLOCK + j % WIDE


@triton.jit
def _exists(j, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    return (j % WIDE < BLOCK) & (j // WIDE < D // BLOCK)


@triton.jit
def _numbers(
    X, row, ok, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr
):
    """`[rows, BLOCKS * WIDE]` as stored, 0 outside."""
    j = tl.arange(0, BLOCKS * WIDE)
    inside = ok[:, None] & _exists(j, D, BLOCK, WIDE)[None, :]
    return tl.load(X + row[:, None] * D + _column(j, BLOCK, WIDE)[None, :], mask=inside, other=0.0)


@triton.jit
def _codes(
    X,
    row,
    ok,
    ZERO: tl.constexpr,
    N: tl.constexpr,
    BYTES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`[rows, BLOCKS, WIDE]` bytes of rows of `N` blocks of `BYTES`; `ZERO` is zero's code."""
    block, i = tl.arange(0, BLOCKS), tl.arange(0, WIDE)
    at = row[:, None, None] * (N * BYTES) + (block * BYTES)[None, :, None] + i[None, None, :]
    inside = ok[:, None, None] & (block < N)[None, :, None] & (i < BYTES)[None, None, :]
    return tl.load(X + at, mask=inside, other=ZERO)


@triton.jit
def _scales(S, row, ok, N: tl.constexpr, BLOCKS: tl.constexpr):
    """`[rows, BLOCKS, 1]` float32, 0 outside."""
    block = tl.arange(0, BLOCKS)
    inside = ok[:, None] & (block < N)[None, :]
    scale = tl.load(S + row[:, None] * N + block[None, :], mask=inside, other=0.0)
    return scale.to(tl.float32)[:, :, None]


@triton.jit
def _entries(
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
    """Rows of a matrix in any store, as `[rows, columns]` of `DTYPE`: all of them in the first
    result, or for INT4 the even and the odd columns in two."""
    N: tl.constexpr = row.shape[0]
    if KIND == NATIVE:
        x = _numbers(X, row, ok, D, BLOCK, WIDE, BLOCKS).to(DTYPE)
        return x, x
    elif KIND == INT8:
        codes = _codes(X, row, ok, 0, D // BLOCK, BLOCK, WIDE, BLOCKS)
        x = codes.to(tl.float32) * _scales(S, row, ok, D // BLOCK, BLOCKS)
        x = tl.reshape(x.to(DTYPE), (N, BLOCKS * WIDE))
        return x, x
    else:
        codes = _codes(X, row, ok, 136, D // BLOCK, BLOCK // 2, WIDE // 2, BLOCKS)
        scale = _scales(S, row, ok, D // BLOCK, BLOCKS)
        low = ((codes & 15).to(tl.float32) - 8.0) * scale
        high = ((codes >> 4).to(tl.float32) - 8.0) * scale
        low = tl.reshape(low.to(DTYPE), (N, BLOCKS * WIDE // 2))
        high = tl.reshape(high.to(DTYPE), (N, BLOCKS * WIDE // 2))
        return low, high


@triton.jit
def _logits(dots, scale, softcap, CAP: tl.constexpr):
    """Scaled and capped logits in base 2."""
    s = dots * scale
    if CAP:
        # tanh(x) = 2 sigmoid(2x) - 1
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    return s * _LOG2E


@triton.jit
def _weigh(s, top, mass):
    """A step of the online softmax: weights, what to shrink earlier sums by, new max and mass."""
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == -_INF, 0.0, new)  # rows that saw nothing yet
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    return p, shrink, new, mass * shrink + tl.sum(p, 1)


@triton.jit
def _store(
    OUT,
    LSE,
    row,
    seen,
    acc,
    top,
    mass,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    some = mass > 0.0
    acc = acc / tl.where(some, mass, 1.0)[:, None]
    lse = tl.where(some, top + tl.log2(tl.where(some, mass, 1.0)), -_INF)
    j = tl.arange(0, BLOCKS * WIDE)
    inside = seen[:, None] & _exists(j, D, BLOCK, WIDE)[None, :]
    tl.store(OUT + row[:, None] * D + _column(j, BLOCK, WIDE)[None, :], acc, mask=inside)
    tl.store(LSE + row, lse, mask=seen)


@triton.jit
def _prefix_tile(
    pid,
    blocks,
    ASK,
    PK,
    PKS,
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
    KIND: tl.constexpr,
    HAS_BETA: tl.constexpr,
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    DV: tl.constexpr,
    VBLOCK: tl.constexpr,
    VWIDE: tl.constexpr,
    VBLOCKS: tl.constexpr,
):
    """One block of the rows that see one tile of entries."""
    entry = TILES + (pid // blocks) * 8
    first, count, h = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    slot, order, readers = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    r = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    seen = r < readers * gm
    if (pid % blocks) * ROWS < readers * gm:
        b = tl.load(ORDER + order + r // gm, mask=seen, other=0)
        q_row = ((b * H + h) * gm + r % gm).to(tl.int64)
        DTYPE: tl.constexpr = ASK.dtype.element_ty
        if KIND == INT4:
            half = tl.arange(0, BLOCKS * WIDE // 2)
            even = 2 * _column(half, BLOCK // 2, WIDE // 2)
            inside = seen[:, None] & _exists(half, D // 2, BLOCK // 2, WIDE // 2)[None, :]
            at = ASK + q_row[:, None] * D + even[None, :]
            q = tl.load(at, mask=inside, other=0.0)
            q_odd = tl.load(at + 1, mask=inside, other=0.0)
        else:
            q = _numbers(ASK, q_row, seen, D, BLOCK, WIDE, BLOCKS)
            q_odd = q
        top = tl.full((ROWS,), -_INF, tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        SPLIT: tl.constexpr = 2 if KIND == INT4 else 1
        acc = tl.zeros((ROWS, VBLOCKS * VWIDE // SPLIT), tl.float32)
        acc_odd = acc
        for j in tl.range(0, count, KEYS, num_stages=STAGES):
            n = j + tl.arange(0, KEYS)
            ok = n < count
            row = (first + n).to(tl.int64)
            k, k_odd = _entries(PK, PKS, row, ok, KIND, DTYPE, D, BLOCK, WIDE, BLOCKS)
            dots = tl.dot(q, tl.trans(k), input_precision="ieee")
            if KIND == INT4:
                dots = tl.dot(q_odd, tl.trans(k_odd), dots, input_precision="ieee")
            s = _logits(dots, scale, softcap, CAP)
            if HAS_BETA:
                s += (tl.load(BETA + row, mask=ok, other=0.0) * _LOG2E)[None, :]
            s = tl.where(ok[None, :], s, -_INF)
            p, shrink, top, mass = _weigh(s, top, mass)
            v, v_odd = _entries(PV, PVS, row, ok, KIND, DTYPE, DV, VBLOCK, VWIDE, VBLOCKS)
            p = p.to(DTYPE)
            acc = tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")
            if KIND == INT4:
                acc_odd = tl.dot(p, v_odd, acc_odd * shrink[:, None], input_precision="ieee")
        out_row = slot.to(tl.int64) * gm + r
        if KIND == INT4:
            acc = tl.interleave(acc, acc_odd)
        _store(OUT, LSE, out_row, seen, acc, top, mass, DV, VBLOCK, VWIDE, VBLOCKS)


@triton.jit
def _live_tile(
    pid,
    blocks,
    tiles,
    tile,
    base,
    Q,
    K,
    V,
    LIVE,
    OUT,
    LSE,
    scale,
    softcap,
    m,
    gm,
    n,
    H,
    k_batch,
    k_head,
    v_batch,
    v_head,
    live_batch,
    HAS_LIVE: tl.constexpr,
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    DV: tl.constexpr,
    VWIDE: tl.constexpr,
):
    """One block of one sequence's rows over one tile of its live tokens: causal, no beta."""
    r = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    k_tile = (pid // blocks) % tiles
    bh = pid // blocks // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    seen = r < gm
    q = _numbers(Q, bh.to(tl.int64) * gm + r, seen, D, D, WIDE, 1)
    at = n - m + r % m  # where the rows stand among the live tokens
    start = k_tile * tile
    # No row of this block sees anything after its own newest token.
    stop = tl.minimum(tl.minimum(start + tile, n), tl.max(tl.where(seen, at, 0), 0) + 1)
    top = tl.full((ROWS,), -_INF, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VWIDE), tl.float32)
    for j in tl.range(start, stop, KEYS, num_stages=STAGES):
        column = j + tl.arange(0, KEYS)
        ok = column < stop
        k = _numbers(K + b * k_batch + h * k_head, column.to(tl.int64), ok, D, D, WIDE, 1)
        s = _logits(tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee"), scale, softcap, CAP)
        sees = ok[None, :] & (column[None, :] <= at[:, None])
        if HAS_LIVE:
            alive = tl.load(LIVE + b * live_batch + column, mask=ok, other=0) != 0
            # Padding sees itself: a row that saw nothing would be NaN.
            sees = sees & (alive[None, :] | (column[None, :] == at[:, None]))
        p, shrink, top, mass = _weigh(tl.where(sees, s, -_INF), top, mass)
        v = _numbers(V + b * v_batch + h * v_head, column.to(tl.int64), ok, DV, DV, VWIDE, 1)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
    out_row = (base + (bh * tiles + k_tile) * gm).to(tl.int64) + r
    _store(OUT, LSE, out_row, seen, acc, top, mass, DV, DV, VWIDE, 1)


# Arguments that change from step to step: a kernel must not be compiled anew for their values.
_VARYING = ["prefix_programs", "prefix_blocks", "live_blocks", "live_tiles", "live_tile"]
_VARYING += ["base", "m", "gm", "n", "live_batch"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["LIVE"])
def partial(
    Q,
    ASK,
    PK,
    PKS,
    PV,
    PVS,
    BETA,
    K,
    V,
    LIVE,
    TILES,
    ORDER,
    OUT,
    LSE,
    prefix_programs,
    prefix_blocks,
    live_blocks,
    live_tiles,
    live_tile,
    base,
    scale,
    ask_scale,
    softcap,
    m,
    gm,
    n,
    H,
    k_batch,
    k_head,
    v_batch,
    v_head,
    live_batch,
    KIND: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    LIVE_ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    DV: tl.constexpr,
    VBLOCK: tl.constexpr,
    VWIDE: tl.constexpr,
    VBLOCKS: tl.constexpr,
    LIVE_WIDE: tl.constexpr,
    LIVE_VWIDE: tl.constexpr,
):
    """Programs `0 .. prefix_programs` take the tiles of the plan, the others live tokens."""
    pid = tl.program_id(0)
    if pid < prefix_programs:
        _prefix_tile(
            pid, prefix_blocks, ASK, PK, PKS, PV, PVS, BETA, TILES, ORDER, OUT, LSE,
            ask_scale, softcap, gm, H, KIND, HAS_BETA, CAP, ROWS, KEYS, STAGES,
            D, BLOCK, WIDE, BLOCKS, DV, VBLOCK, VWIDE, VBLOCKS,
        )  # fmt: skip
    else:
        _live_tile(
            pid - prefix_programs, live_blocks, live_tiles, live_tile, base, Q, K, V, LIVE,
            OUT, LSE, scale, softcap, m, gm, n, H, k_batch, k_head, v_batch, v_head, live_batch,
            HAS_LIVE, CAP, LIVE_ROWS, KEYS, STAGES, D, LIVE_WIDE, DV, LIVE_VWIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["live_tiles", "base", "m", "gm"])
def reduce(
    PART,
    LSE,
    HEADS,
    ROWS,
    SINKS,
    OUT,
    live_tiles,
    base,
    m,
    gm,
    H,
    Hq,
    HAS_SINKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DV: tl.constexpr,
    VWIDE: tl.constexpr,
):
    """Join one query row's tiles, and its sink: `OUT [B, m, Hq, dv]`."""
    pid = tl.program_id(0)
    bh, within = pid // gm, pid % gm
    b, h = bh // H, bh % H
    hq = h * (gm // m) + within // m
    context, index = tl.load(ROWS + b * 4), tl.load(ROWS + b * 4 + 1)
    readers = tl.load(ROWS + b * 4 + 2)
    head = HEADS + (context * H + h) * 2
    slot, tiles = tl.load(head), tl.load(head + 1)
    j = tl.arange(0, VWIDE)
    top = tl.full((), -_INF, tl.float32)
    if HAS_SINKS:
        top = tl.load(SINKS + hq).to(tl.float32) * _LOG2E
    mass = tl.where(top == -_INF, 0.0, 1.0)  # a sink takes mass and adds no value
    acc = tl.zeros((VWIDE,), tl.float32)
    for start in range(0, tiles + live_tiles, CHUNK):
        k = start + tl.arange(0, CHUNK)
        ok = k < tiles + live_tiles
        of_prefix = (slot + k * readers + index).to(tl.int64) * gm + within
        of_live = (base + (bh * live_tiles + k - tiles) * gm + within).to(tl.int64)
        row = tl.where(k < tiles, of_prefix, of_live)
        lse = tl.load(LSE + row, mask=ok, other=-_INF)
        new = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new == -_INF, 0.0, new)
        p, shrink = tl.exp2(lse - safe), tl.exp2(top - safe)
        inside = ok[:, None] & (j < DV)[None, :]
        part = tl.load(PART + row[:, None] * DV + j[None, :], mask=inside, other=0.0)
        acc = acc * shrink + tl.sum(part * p[:, None], 0)
        top, mass = new, mass * shrink + tl.sum(p, 0)
    out = OUT + ((b * m + within % m).to(tl.int64) * Hq + hq) * DV
    tl.store(out + j, (acc / mass).to(OUT.dtype.element_ty), mask=j < DV)
