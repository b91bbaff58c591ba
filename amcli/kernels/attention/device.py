"""The two Triton kernels: `partial`, attention of some query rows over one tile of keys, and
`reduce`, which joins a row's results from its tiles.

Rows: a query row of KV head `h` in batch row `b` is `within = (query head in the group) * m +
(new token)`, out of `gm`; its place in `Q [B, Hq, m, d]` is `(b * H + h) * gm + within`.

A tile's result is its softmax output and the base-2 log-sum-exp of its logits; two results are
joined by their log-sum-exps. Logits are in base 2 because that is what the hardware exponentiates.

Arguments without an annotation are pointers, integers and tensors of Triton's own.
"""
# mypy: ignore-errors
# Triton compiles these functions from their source; Python's types say nothing about them.

from __future__ import annotations

import triton
import triton.language as tl

from amcli.kernels.attention.packed import packed_tile
from amcli.kernels.attention.stores import INT4, NATIVE, PACKED, column, entries, exists, numbers
from amcli.kernels.softmax import INF, LOG2E, logits, weigh


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
    lse = tl.where(some, top + tl.log2(tl.where(some, mass, 1.0)), -INF)
    j = tl.arange(0, BLOCKS * WIDE)
    inside = seen[:, None] & exists(j, D, BLOCK, WIDE)[None, :]
    tl.store(OUT + row[:, None] * D + column(j, BLOCK, WIDE)[None, :], acc, mask=inside)
    tl.store(LSE + row, lse, mask=seen)


@triton.jit
def _largest(x, y):
    big = tl.maximum(tl.max(tl.abs(x), 1), tl.max(tl.abs(y), 1)).to(tl.float32)
    return tl.where(big > 0.0, big, 1.0)


@triton.jit
def _divided(x, by):
    return (x.to(tl.float32) / by[:, None]).to(tl.float16)


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
        HALF: tl.constexpr = KIND != NATIVE and ASK.dtype.element_ty != tl.float32
        DTYPE: tl.constexpr = tl.float16 if HALF else ASK.dtype.element_ty
        logit_scale = tl.full((ROWS,), 1.0, tl.float32) * scale
        if KIND == INT4:
            word = tl.arange(0, BLOCKS * WIDE // 4)
            inside = seen[:, None] & exists(word, D // 4, BLOCK // 4, WIDE // 4)[None, :]
            at = ASK + q_row[:, None] * D + 4 * column(word, BLOCK // 4, WIDE // 4)[None, :]
            q_0 = tl.load(at, mask=inside, other=0.0)
            q_1 = tl.load(at + 1, mask=inside, other=0.0)
            q_2 = tl.load(at + 2, mask=inside, other=0.0)
            q_3 = tl.load(at + 3, mask=inside, other=0.0)
        else:
            q_0 = numbers(ASK, q_row, seen, D, BLOCK, WIDE, BLOCKS)
            q_1, q_2, q_3 = q_0, q_0, q_0
        if HALF:
            # Codes times scales fit fp16; queries of any size do after division.
            largest = tl.maximum(_largest(q_0, q_1), _largest(q_2, q_3))
            q_0, q_1 = _divided(q_0, largest), _divided(q_1, largest)
            q_2, q_3 = _divided(q_2, largest), _divided(q_3, largest)
            logit_scale *= largest
        top = tl.full((ROWS,), -INF, tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        PIECES: tl.constexpr = 4 if KIND == INT4 else 1
        acc = tl.zeros((ROWS, VBLOCKS * VWIDE // PIECES), tl.float32)
        acc_1, acc_2, acc_3 = acc, acc, acc
        for j in tl.range(0, count, KEYS, num_stages=STAGES):
            n = j + tl.arange(0, KEYS)
            ok = n < count
            row = (first + n).to(tl.int64)
            k_0, k_1, k_2, k_3 = entries(PK, PKS, row, ok, KIND, DTYPE, D, BLOCK, WIDE, BLOCKS)
            dots = tl.dot(q_0, tl.trans(k_0), input_precision="ieee")
            if KIND == INT4:
                dots = tl.dot(q_1, tl.trans(k_1), dots, input_precision="ieee")
                dots = tl.dot(q_2, tl.trans(k_2), dots, input_precision="ieee")
                dots = tl.dot(q_3, tl.trans(k_3), dots, input_precision="ieee")
            s = logits(dots, logit_scale[:, None], softcap, CAP)
            if HAS_BETA:
                s += (tl.load(BETA + row, mask=ok, other=0.0) * LOG2E)[None, :]
            s = tl.where(ok[None, :], s, -INF)
            p, shrink, top, mass = weigh(s, top, mass)
            v_0, v_1, v_2, v_3 = entries(PV, PVS, row, ok, KIND, DTYPE, DV, VBLOCK, VWIDE, VBLOCKS)
            p, shrink = p.to(DTYPE), shrink[:, None]
            acc = tl.dot(p, v_0, acc * shrink, input_precision="ieee")
            if KIND == INT4:
                acc_1 = tl.dot(p, v_1, acc_1 * shrink, input_precision="ieee")
                acc_2 = tl.dot(p, v_2, acc_2 * shrink, input_precision="ieee")
                acc_3 = tl.dot(p, v_3, acc_3 * shrink, input_precision="ieee")
        if KIND == INT4:
            acc = tl.interleave(tl.interleave(acc, acc_2), tl.interleave(acc_1, acc_3))
        out_row = slot.to(tl.int64) * gm + r
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
    AT,
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
    window,
    HAS_LIVE: tl.constexpr,
    HAS_AT: tl.constexpr,
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    DV: tl.constexpr,
    VWIDE: tl.constexpr,
):
    """One block of one sequence's rows over one tile of its live tokens: causal, no beta.

    With `HAS_AT`, `n` is room for tokens; the `m` new ones stand at the columns in `AT` and see
    `window` columns, their own included."""
    r = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    k_tile = (pid // blocks) % tiles
    bh = pid // blocks // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    seen = r < gm
    q = numbers(Q, bh.to(tl.int64) * gm + r, seen, D, D, WIDE, 1)
    # Where the rows stand among the live tokens.
    at = n - m + r % m
    if HAS_AT:
        at = tl.load(AT + r % m, mask=seen, other=0).to(tl.int32)
    start = k_tile * tile
    # No row of this block sees anything after its own newest token.
    stop = tl.minimum(tl.minimum(start + tile, n), tl.max(tl.where(seen, at, 0), 0) + 1)
    if HAS_AT:
        start = tl.maximum(start, tl.min(tl.where(seen, at, n), 0) - window + 1)
    top = tl.full((ROWS,), -INF, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VWIDE), tl.float32)
    for j in tl.range(start, stop, KEYS, num_stages=STAGES):
        column = j + tl.arange(0, KEYS)
        ok = column < stop
        k = numbers(K + b * k_batch + h * k_head, column.to(tl.int64), ok, D, D, WIDE, 1)
        s = logits(tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee"), scale, softcap, CAP)
        sees = ok[None, :] & (column[None, :] <= at[:, None])
        if HAS_AT:
            sees = sees & (column[None, :] > at[:, None] - window)
        if HAS_LIVE:
            alive = tl.load(LIVE + b * live_batch + column, mask=ok, other=0) != 0
            # Padding sees itself: a row that saw nothing would be NaN.
            sees = sees & (alive[None, :] | (column[None, :] == at[:, None]))
        p, shrink, top, mass = weigh(tl.where(sees, s, -INF), top, mass)
        v = numbers(V + b * v_batch + h * v_head, column.to(tl.int64), ok, DV, DV, VWIDE, 1)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
    out_row = (base + (bh * tiles + k_tile) * gm).to(tl.int64) + r
    _store(OUT, LSE, out_row, seen, acc, top, mass, DV, DV, VWIDE, 1)


# Arguments that change from step to step: their values must not trigger recompilation.
_VARYING = ["prefix_programs", "prefix_blocks", "live_blocks", "live_tiles", "live_tile"]
_VARYING += ["parts", "base", "m", "gm", "n", "live_batch", "window"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["LIVE", "AT"])
def partial(
    Q,
    ASK,
    PK,
    PKS,
    PKZ,
    PV,
    PVS,
    BETA,
    K,
    V,
    LIVE,
    AT,
    TILES,
    ORDER,
    OUT,
    parts,
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
    window,
    KIND: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    HAS_AT: tl.constexpr,
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    LIVE_ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    LIVE_KEYS: tl.constexpr,
    LIVE_STAGES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    DV: tl.constexpr,
    VBLOCK: tl.constexpr,
    VWIDE: tl.constexpr,
    VBLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    VBITS: tl.constexpr,
    VUNIT: tl.constexpr,
    LIVE_WIDE: tl.constexpr,
    LIVE_VWIDE: tl.constexpr,
):
    """The first `prefix_programs` programs take the tiles of the plan, the others live tokens."""
    pid = tl.program_id(0)
    LSE = OUT + parts.to(tl.int64) * DV  # behind the results
    if pid < prefix_programs:
        if KIND == PACKED:
            packed_tile(
                pid, prefix_blocks, ASK, PK, PKS, PKZ, PV, PVS, BETA, TILES, ORDER, OUT, LSE,
                ask_scale, softcap, gm, H, HAS_BETA, CAP, ROWS, KEYS, STAGES,
                BITS, D, UNIT, WIDE, VBITS, DV, VUNIT, VWIDE, VBLOCK, VBLOCKS,
            )  # fmt: skip
        else:
            _prefix_tile(
                pid, prefix_blocks, ASK, PK, PKS, PV, PVS, BETA, TILES, ORDER, OUT, LSE,
                ask_scale, softcap, gm, H, KIND, HAS_BETA, CAP, ROWS, KEYS, STAGES,
                D, BLOCK, WIDE, BLOCKS, DV, VBLOCK, VWIDE, VBLOCKS,
            )  # fmt: skip
    else:
        _live_tile(
            pid - prefix_programs, live_blocks, live_tiles, live_tile, base, Q, K, V, LIVE, AT,
            OUT, LSE, scale, softcap, m, gm, n, H, k_batch, k_head, v_batch, v_head, live_batch,
            window, HAS_LIVE, HAS_AT, CAP, LIVE_ROWS, LIVE_KEYS, LIVE_STAGES,
            D, LIVE_WIDE, DV, LIVE_VWIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "live_tiles", "base", "m", "gm"])
def reduce(
    PART,
    parts,
    HEADS,
    ROWS,
    SINKS,
    OUT,
    TURNED,
    live_tiles,
    base,
    m,
    gm,
    H,
    Hq,
    HAS_SINKS: tl.constexpr,
    APART: tl.constexpr,
    CHUNK: tl.constexpr,
    DV: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Join one query row's tiles, and its sink: `COLUMNS` columns of a row of
    `OUT [B, m, Hq, dv]`. With `APART` the share of the prefix goes to `TURNED` instead, shaped the
    same."""
    pid = tl.program_id(0)
    LSE = PART + parts.to(tl.int64) * DV
    bh, within = pid // gm, pid % gm
    b, h = bh // H, bh % H
    hq = h * (gm // m) + within // m
    context, index = tl.load(ROWS + b * 4), tl.load(ROWS + b * 4 + 1)
    readers = tl.load(ROWS + b * 4 + 2)
    head = HEADS + (context * H + h) * 2
    slot, tiles = tl.load(head), tl.load(head + 1)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.full((), -INF, tl.float32)
    if HAS_SINKS:
        top = tl.load(SINKS + hq).to(tl.float32) * LOG2E
    mass = tl.where(top == -INF, 0.0, 1.0)  # a sink takes mass and adds no value
    acc = tl.zeros((COLUMNS,), tl.float32)
    turned = acc
    for start in range(0, tiles + live_tiles, CHUNK):
        k = start + tl.arange(0, CHUNK)
        ok = k < tiles + live_tiles
        of_prefix = (slot + k * readers + index).to(tl.int64) * gm + within
        of_live = (base + (bh * live_tiles + k - tiles) * gm + within).to(tl.int64)
        row = tl.where(k < tiles, of_prefix, of_live)
        lse = tl.load(LSE + row, mask=ok, other=-INF)
        new = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new == -INF, 0.0, new)
        p, shrink = tl.exp2(lse - safe), tl.exp2(top - safe)
        inside = ok[:, None] & (j < DV)[None, :]
        part = tl.load(PART + row[:, None] * DV + j[None, :], mask=inside, other=0.0)
        top, mass = new, mass * shrink + tl.sum(p, 0)
        if APART:
            past = tl.where(k < tiles, p, 0.0)
            turned = turned * shrink + tl.sum(part * past[:, None], 0)
            p -= past
        acc = acc * shrink + tl.sum(part * p[:, None], 0)
    out = ((b * m + within % m).to(tl.int64) * Hq + hq) * DV + j
    tl.store(OUT + out, (acc / mass).to(OUT.dtype.element_ty), mask=j < DV)
    if APART:
        tl.store(TURNED + out, (turned / mass).to(OUT.dtype.element_ty), mask=j < DV)
