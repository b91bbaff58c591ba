"""The streaming statistics as Triton kernels: no score ever leaves the chip.

`row_stats` goes along the keys for a block of queries (log-sum-exp and output: the forward pass of
FlashAttention, arXiv 2307.08691), `column_stats` along the queries for a block of keys (the
attention each key got). Products of 16-bit inputs are exact and summed in float32; float32 inputs
are multiplied in three TF32 parts, which keeps float32's digits. Importing this imports Triton;
`matching.scores` and `models.attend` choose between these and plain PyTorch, and both give the
same results up to rounding.
"""
# mypy: ignore-errors
# Triton compiles these functions from their source; Python's types say nothing about them.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from amcli.kernels.softmax import INF, LOG2E, logits, weigh

MAX_DIM = 256
"""Head dimension up to which blocks of queries and keys fit a multiprocessor."""

PARTS = 64
"""Most pieces that queries are split into per block of keys, so that even few keys fill a GPU."""


def can_take(*tensors: torch.Tensor) -> bool:
    """Whether these inputs `[H, n, d]` can go through the kernels."""
    known = (torch.float32, torch.float16, torch.bfloat16)
    return all(
        x.is_cuda and x.dtype in known and x.shape[-1] <= MAX_DIM and not x.requires_grad
        for x in tensors
    )


@triton.jit(do_not_specialize=["n", "T"])
def _rows(
    Q,
    K,
    V,
    BIAS,
    LIMIT,
    LSE,
    OUT,
    n,
    T,
    scale,
    softcap,
    q_head,
    k_head,
    v_head,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDE: tl.constexpr,
    VWIDE: tl.constexpr,
    CAP: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n
    j, jv = tl.arange(0, WIDE), tl.arange(0, VWIDE)
    q_at = Q + h * q_head + row[:, None].to(tl.int64) * D + j[None, :]
    q = tl.load(q_at, mask=real[:, None] & (j < D)[None, :], other=0.0).to(DTYPE)
    end = T
    if HAS_LIMIT:
        limit = tl.load(LIMIT + row, mask=real, other=0)
        end = tl.minimum(T, tl.max(limit, 0))
    top = tl.full([ROWS], -INF, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VWIDE], tl.float32)
    for start in range(0, end, KEYS):
        column = start + tl.arange(0, KEYS)
        there = column < T
        k_at = K + h * k_head + column[None, :].to(tl.int64) * D + j[:, None]
        k = tl.load(k_at, mask=there[None, :] & (j < D)[:, None], other=0.0).to(DTYPE)
        s = logits(tl.dot(q, k, input_precision=PRECISION), scale, softcap, CAP)
        if HAS_BIAS:
            s += tl.load(BIAS + h * T + column, mask=there, other=0.0)[None, :] * LOG2E
        seen = there[None, :]
        if HAS_LIMIT:
            seen = seen & (column[None, :] < limit[:, None])
        s = tl.where(seen, s, -INF)
        p, shrink, top, mass = weigh(s, top, mass)
        if HAS_V:
            v_at = V + h * v_head + column[:, None].to(tl.int64) * DV + jv[None, :]
            v = tl.load(v_at, mask=there[:, None] & (jv < DV)[None, :], other=0.0).to(DTYPE)
            acc = acc * shrink[:, None] + tl.dot(p.to(DTYPE), v, input_precision=PRECISION)
    some = mass > 0.0
    lse = (top + tl.log2(tl.where(some, mass, 1.0))) / LOG2E
    lse = tl.where(some, lse, -INF)
    tl.store(LSE + h * n + row, lse, mask=real)
    if HAS_V:
        acc = acc / tl.where(some, mass, 1.0)[:, None]
        out_at = OUT + (h * n + row[:, None].to(tl.int64)) * DV + jv[None, :]
        tl.store(out_at, acc, mask=real[:, None] & (jv < DV)[None, :])


@triton.jit(do_not_specialize=["n", "T", "step"])
def _columns(
    Q,
    K,
    LSE,
    LIMIT,
    MAX,
    SQUARES,
    SUM,
    n,
    T,
    step,
    scale,
    softcap,
    q_head,
    k_head,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    CAP: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    WANT_MAX: tl.constexpr,
    WANT_SQUARES: tl.constexpr,
    WANT_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    there = column < T
    j = tl.arange(0, WIDE)
    k_at = K + h * k_head + column[None, :].to(tl.int64) * D + j[:, None]
    k = tl.load(k_at, mask=there[None, :] & (j < D)[:, None], other=0.0).to(DTYPE)
    top = tl.full([KEYS], -INF, tl.float32)
    squares = tl.zeros([KEYS], tl.float32)
    total = tl.zeros([KEYS], tl.float32)
    for start in range(part * step, tl.minimum(n, (part + 1) * step), ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < n
        q_at = Q + h * q_head + row[:, None].to(tl.int64) * D + j[None, :]
        q = tl.load(q_at, mask=real[:, None] & (j < D)[None, :], other=0.0).to(DTYPE)
        lse = tl.load(LSE + h * n + row, mask=real, other=INF)
        s = logits(tl.dot(q, k, input_precision=PRECISION), scale, softcap, CAP) - lse[:, None]
        if HAS_LIMIT:
            limit = tl.load(LIMIT + row, mask=real, other=0)
            s = tl.where(column[None, :] < limit[:, None], s, -INF)
        if WANT_MAX:
            top = tl.maximum(top, tl.max(s, 0))
        if WANT_SQUARES:
            squares += tl.sum(tl.exp2(2.0 * s), 0)
        if WANT_SUM:
            total += tl.sum(tl.exp2(s), 0)
    out_at = (part * tl.num_programs(1) + h) * T + column
    if WANT_MAX:
        tl.store(MAX + out_at, tl.exp2(top), mask=there)
    if WANT_SQUARES:
        tl.store(SQUARES + out_at, squares, mask=there)
    if WANT_SUM:
        tl.store(SUM + out_at, total, mask=there)


def row_stats(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    limit: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-sum-exp `[H, n]`, float32, and with values the output `[H, n, dv]` in `dtype`; arguments
    as for `matching.scores.attention_stats`."""
    H, n, d = Q.shape
    T = K.shape[1]
    dv = d if V is None else V.shape[2]
    lse = torch.empty((H, n), dtype=torch.float32, device=Q.device)
    out = None if V is None else torch.empty((H, n, dv), dtype=dtype, device=Q.device)
    if not lse.numel():
        return lse, out
    Q, K = _rows_together(Q), _rows_together(K)
    V = K if V is None else _rows_together(V)
    kind, precision, size = _arithmetic(Q, K, V)
    at = _fitting(_ALONG_KEYS[size, max(d, dv) > 128], Q, size, d, d if out is None else d + dv)
    like = lse  # stands in as a pointer for absent tensors
    seen = None if limit is None else limit.to(device=Q.device, dtype=torch.int32)
    bias = None if bias is None else bias.float().contiguous()
    _rows[(triton.cdiv(n, at.rows), H)](
        Q, K, V, like if bias is None else bias, like if seen is None else seen, lse,
        like if out is None else out, n, T, scale, softcap or 0.0,
        Q.stride(0), K.stride(0), V.stride(0),
        D=d, DV=dv, WIDE=_wide(d), VWIDE=_wide(dv), CAP=softcap is not None,
        HAS_V=out is not None, HAS_BIAS=bias is not None, HAS_LIMIT=seen is not None,
        ROWS=at.rows, KEYS=at.keys, DTYPE=kind, PRECISION=precision, num_warps=at.warps,
        num_stages=at.stages,
    )  # fmt: skip
    return lse, out


def column_stats(
    Q: torch.Tensor,
    K: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    softcap: float | None,
    limit: torch.Tensor | None,
    kinds: frozenset[str],
) -> dict[str, torch.Tensor]:
    """Over all queries, for each key: the largest `exp(s - lse)`, the sum of squares, the sum.

    `lse [H, n]` float32; a query whose `lse` is infinite counts for nothing. Each `[H, T]`
    float32, by the names of `scores.SCORE_KINDS` (rms: the sum of squares, mean: the sum).
    """
    H, n, d = Q.shape
    T = K.shape[1]
    if not n or not T or not kinds:
        return {kind: torch.zeros((H, T), device=Q.device) for kind in kinds}
    Q, K = _rows_together(Q), _rows_together(K)
    kind, precision, size = _arithmetic(Q, K)
    at = _fitting(_ALONG_QUERIES[size, d > 128], Q, size, d, d)
    blocks = triton.cdiv(T, at.keys) * H
    parts = max(1, min(PARTS, 1024 // blocks, triton.cdiv(n, 4 * at.rows)))
    step = triton.cdiv(triton.cdiv(n, parts), at.rows) * at.rows
    made = {k: torch.empty((parts, H, T), dtype=torch.float32, device=Q.device) for k in kinds}
    shift = (lse * LOG2E.value).contiguous()
    shift = shift.masked_fill(shift == -torch.inf, torch.inf)
    seen = None if limit is None else limit.to(device=Q.device, dtype=torch.int32)
    _columns[(triton.cdiv(T, at.keys), H, parts)](
        Q, K, shift, shift if seen is None else seen, made.get("max", shift),
        made.get("rms", shift), made.get("mean", shift), n, T, step, scale, softcap or 0.0,
        Q.stride(0), K.stride(0),
        D=d, WIDE=_wide(d), CAP=softcap is not None, HAS_LIMIT=seen is not None,
        WANT_MAX="max" in kinds, WANT_SQUARES="rms" in kinds, WANT_SUM="mean" in kinds,
        ROWS=at.rows, KEYS=at.keys, DTYPE=kind, PRECISION=precision, num_warps=at.warps,
        num_stages=at.stages,
    )  # fmt: skip
    return {k: x.amax(0) if k == "max" else x.sum(0) for k, x in made.items()}


@dataclass(frozen=True)
class _Blocks:
    """Rows of queries and keys of a step, warps, and steps in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


# By bytes per number, and whether a dimension is above 128. Those for 16-bit numbers were among the
# fastest of six or seven on an H200; those for float32 are what fits.
_ALONG_KEYS = {
    (2, False): _Blocks(64, 128, 4, 3),
    (2, True): _Blocks(128, 64, 8, 3),
    (4, False): _Blocks(64, 32, 4, 2),
    (4, True): _Blocks(32, 16, 4, 2),
}
_ALONG_QUERIES = {
    (2, False): _Blocks(128, 64, 4, 3),
    (2, True): _Blocks(64, 128, 8, 3),
    (4, False): _Blocks(32, 64, 4, 2),
    (4, True): _Blocks(32, 32, 4, 2),
}


def _fitting(at: _Blocks, on: torch.Tensor, size: int, held: int, read: int) -> _Blocks:
    """The same in smaller steps if a multiprocessor's shared memory is small.

    `held` numbers of each row stay in it, `read` of each key pass through it (or vice versa).
    """
    if not on.is_cuda:
        return at
    room = torch.cuda.get_device_properties(on.device).shared_memory_per_block_optin
    while at.stages > 1 and size * (at.rows * held + at.stages * at.keys * read) > room:
        at = replace(at, stages=at.stages - 1)
    while min(at.rows, at.keys) > 16 and size * (at.rows * held + at.keys * read) > room:
        at = replace(at, rows=at.rows // 2, keys=at.keys // 2)
    return at


def _rows_together(x: torch.Tensor) -> torch.Tensor:
    """`[H, n, d]` whose rows are `d` numbers apart; heads may be anywhere."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _wide(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def _arithmetic(*tensors: torch.Tensor) -> tuple[tl.dtype, str, int]:
    """The dtype of products: the inputs' common 16-bit dtype, or float32; and its bytes."""
    dtypes = {x.dtype for x in tensors}
    if dtypes == {torch.bfloat16}:
        return tl.bfloat16, "tf32", 2
    if dtypes == {torch.float16}:
        return tl.float16, "tf32", 2
    return tl.float32, "tf32x3", 4
