"""PyTorch's own flash attention on a CPU, with the log masses that its public function discards.

Twice as fast as products and exponentials in tiles: scores never leave the innermost cache.
"""

from __future__ import annotations

from typing import Any

import torch

_OP: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def can_take(Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> bool:
    """Whether these inputs can go through it: `Q [B, H, n, d]`, `K, V [B, H, T, d]`."""
    if _OP is None or Q.device.type != "cpu" or not (Q.numel() and K.numel()):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (Q, K, V)):
        return False
    alike = Q.dtype == K.dtype == V.dtype and Q.shape[-1] == V.shape[-1]
    return alike and all(x.stride(-1) == 1 for x in (Q, K, V))


def attention(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    scale: float,
    *,
    bias: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, n, d]`, in the inputs' dtype, and the natural log of the masses `[B, H, n]`.

    bias    `[B, H, T]` in the inputs' dtype, added to the logits; -inf hides a key
    causal  query `i` sees only the keys up to `i`
    """
    if bias is None:
        out, mass = _OP(Q, K, V, 0.0, causal, scale=scale)
        return out, mass
    mask = bias.unsqueeze(2).expand(-1, -1, Q.shape[2], -1)
    out, mass = _OP(Q, K, V, 0.0, causal, attn_mask=mask, scale=scale)
    nothing = (bias == -torch.inf).all(2, keepdim=True)  # the kernel gives such queries a mass of 1
    return out.masked_fill(nothing.unsqueeze(3), 0.0), mass.masked_fill(nothing, -torch.inf)
