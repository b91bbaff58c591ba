"""What every kernel does with its products: base-2 logits, and a step of the online softmax.

Base 2 is what the hardware exponentiates. Arguments without an annotation are Triton's tensors.
"""
# mypy: ignore-errors
# Triton compiles these functions from their source; Python's types say nothing about them.

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


@triton.jit
def logits(dots, scale, softcap, CAP: tl.constexpr):
    """Scaled and capped logits in base 2."""
    s = dots * scale
    if CAP:
        # tanh(x) = 2 sigmoid(2x) - 1
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    return s * LOG2E


@triton.jit
def weigh(s, top, mass):
    """A step of the online softmax: weights, factor for earlier sums, new maximum and mass."""
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == -INF, 0.0, new)  # rows that saw nothing yet
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    return p, shrink, new, mass * shrink + tl.sum(p, 1)
