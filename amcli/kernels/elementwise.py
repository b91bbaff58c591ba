"""What a model does between its products, in one launch each: norms, rotations, gates.

PyTorch takes up to ten launches for one of these, and while decoding each launch takes longer than
the few numbers it works on. Results are rounded wherever PyTorch's are. Importing this imports
Triton.
"""
# mypy: ignore-errors
# Triton compiles these functions from their source; Python's types say nothing about them.

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROUNDED, EXACT, PLUS_ONE = (tl.constexpr(kind) for kind in range(3))
"""What an RMS norm does with its weights: multiplies with them what it has rounded before, or has
not; or multiplies with one more than them."""


@triton.jit
def _norm(X, W, OUT, eps, D, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    ok = j < D
    x = tl.load(X + row * D + j, mask=ok, other=0.0).to(tl.float32)
    w = tl.load(W + j, mask=ok, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    if KIND == ROUNDED:
        y = y.to(OUT.dtype.element_ty).to(tl.float32) * w
    elif KIND == PLUS_ONE:
        y = y * (1.0 + w)
    else:
        y = y * w
    tl.store(OUT + row * D + j, y.to(OUT.dtype.element_ty), mask=ok)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: int) -> torch.Tensor:
    """The RMS norm of `x [..., D]`, in its dtype, with `weight [D]`."""
    x, D = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(D)
    warps = max(1, min(8, block // 256))
    _norm[(x.numel() // D,)](x, weight, out, eps, D, kind, block, num_warps=warps)
    return out


@triton.jit
def _turn(X, OUT, COS, SIN, D: tl.constexpr, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = OUT.dtype.element_ty
    HALF: tl.constexpr = D // 2
    j = tl.arange(0, BLOCK)
    ok = j < HALF
    a = tl.load(X + j, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(X + HALF + j, mask=ok, other=0.0).to(tl.float32)
    cos = tl.load(COS + j, mask=ok, other=0.0).to(tl.float32)
    sin = tl.load(SIN + j, mask=ok, other=0.0).to(tl.float32)
    # Each product is rounded, as it is where it is a tensor of its own.
    x = (a * cos).to(DTYPE).to(tl.float32) - (b * sin).to(DTYPE).to(tl.float32)
    tl.store(OUT + j, x.to(DTYPE), mask=ok)
    cos = tl.load(COS + HALF + j, mask=ok, other=0.0).to(tl.float32)
    sin = tl.load(SIN + HALF + j, mask=ok, other=0.0).to(tl.float32)
    x = (b * cos).to(DTYPE).to(tl.float32) + (a * sin).to(DTYPE).to(tl.float32)
    tl.store(OUT + HALF + j, x.to(DTYPE), mask=ok)


@triton.jit
def _rotate(
    Q,
    K,
    COS,
    SIN,
    Q_OUT,
    K_OUT,
    m,
    Hq,
    H,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    cos_batch,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, t, h = tl.program_id(0) // m, tl.program_id(0) % m, tl.program_id(1)
    b, t = b.to(tl.int64), t.to(tl.int64)
    at = b * cos_batch + t * D
    if h < Hq:
        x, out = Q + b * q_batch + h * q_head + t * q_token, Q_OUT + ((b * Hq + h) * m + t) * D
        _turn(x, out, COS + at, SIN + at, D, BLOCK)
    else:
        h -= Hq
        x, out = K + b * k_batch + h * k_head + t * k_token, K_OUT + ((b * H + h) * m + t) * D
        _turn(x, out, COS + at, SIN + at, D, BLOCK)


def can_rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether `rotate` takes these: one dtype, whole heads, each of one run of numbers."""
    B, _, m, d = q.shape
    angles = cos.shape == sin.shape and cos.shape in ((1, m, d), (B, m, d))
    plain = len({x.dtype for x in (q, k, cos, sin)}) == 1
    runs = q.stride(3) == k.stride(3) == 1 and cos.is_contiguous() and sin.is_contiguous()
    return angles and plain and runs and k.shape[-1] == d and d % 2 == 0


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE of `q [B, Hq, m, d]` and `k [B, H, m, d]`, whose halves are turned into each other, by
    angles of `cos` and `sin` `[B or 1, m, d]`."""
    (B, Hq, m, d), H = q.shape, k.shape[1]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _rotate[(B * m, Hq + H)](
        q, k, cos, sin, q_out, k_out, m, Hq, H, *q.stride()[:3], *k.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0), d, triton.next_power_of_2(d // 2), num_warps=1,
    )  # fmt: skip
    return q_out, k_out


@triton.jit
def _gated(GATE, UP, OUT, n, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = OUT.dtype.element_ty
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = j < n
    gate = tl.load(GATE + j, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(UP + j, mask=ok, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(DTYPE).to(tl.float32)
    tl.store(OUT + j, (gate * up).to(DTYPE), mask=ok)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`."""
    gate, up = gate.contiguous(), up.contiguous()
    out, block = torch.empty_like(gate), 512
    _gated[(triton.cdiv(gate.numel(), block),)](gate, up, out, gate.numel(), block, num_warps=4)
    return out
