"""Expected attention: what future queries would pay on average, if they were Gaussian.

Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future
Queries Distribution", arXiv 2510.00636. Queries before RoPE are taken as normal with the mean
`μ` and covariance `Σ` of the context's own; RoPE is averaged over the next 512 positions, as
one matrix `R`, and

    z_j = E exp(q·k_j·s) = exp(s·(Rμ)ᵀk_j + s²/2·k_jᵀ RΣRᵀ k_j)

normalised over the keys gives the expected probability. Times `‖v_j‖`, averaged over the heads
of a group. The first four tokens are kept and stay out of the statistics and of the softmax.
Softcaps of the logits are ignored, as in kvpress.
"""

from __future__ import annotations

import torch

from amcli.matching.baselines.evicting import evict, keep
from amcli.matching.methods import SINKS, Look, ScoreContext

EPSILON = {"adakv": 1e-2}
"""Added to the probability, by budget: where heads compete, so that `‖v‖` counts in all."""


class Moments:
    """Count, mean `[H, G, d]` and squared deviations `[H, G, d, d]` of the queries before RoPE.

    Merged chunk by chunk (Chan, Golub and LeVeque 1983), so that no query is kept.
    """

    def __init__(self) -> None:
        self.count = 0
        self.scale = 1.0
        self.mean: torch.Tensor | None = None
        self.spread: torch.Tensor | None = None

    def update(self, look: Look) -> None:
        """Adds more queries, without those of the sinks."""
        if look.unrotated is None:
            raise ValueError("expected attention needs queries before RoPE")
        self.scale = look.logits.scale
        q = look.unrotated[:, :, max(0, SINKS - look.first) :].float()  # [H, G, m, d]
        m = q.shape[2]
        if m == 0:
            return
        mean = q.mean(2)
        centred = q - mean.unsqueeze(2)
        spread = centred.mT @ centred  # [H, G, d, d]
        if self.mean is None or self.spread is None:
            self.count, self.mean, self.spread = m, mean, spread
            return
        total = self.count + m
        step = mean - self.mean
        between = step.unsqueeze(-1) * step.unsqueeze(-2) * (self.count * m / total)
        self.spread = self.spread + spread + between
        self.mean = self.mean + step * (m / total)
        self.count = total


def score(ctx: ScoreContext) -> torch.Tensor:
    """`(mean over the group of the expected probability + ε)·‖v‖`."""
    if not isinstance(ctx.watched, Moments) or ctx.rotation is None:
        raise ValueError("expected attention watches the context's queries before RoPE")
    P = expected_probability(ctx.watched, ctx.K[:, SINKS:].float(), ctx.rotation.float())
    norms = ctx.V[:, SINKS:].float().norm(dim=-1)
    scores = (P + EPSILON.get(ctx.budget, 0.0)) * norms
    return keep(torch.nn.functional.pad(scores, (min(SINKS, ctx.K.shape[1]), 0)), ctx.first(SINKS))


def expected_probability(seen: Moments, K: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """`[H, T]`: mean over the group of the expected softmax over keys `K [H, T, d]`, float32."""
    if seen.mean is None or seen.spread is None:  # the context is only sinks
        return K.new_zeros(K.shape[:2])
    mean = seen.mean @ R.T  # [H, G, d]
    covariance = R @ (seen.spread / seen.count) @ R.T  # [H, G, d, d]
    P = K.new_zeros(K.shape[:2])
    for g in range(mean.shape[1]):  # one head of the group at a time: a copy of K each
        linear = (K @ mean[:, g].unsqueeze(-1)).squeeze(-1)
        quadratic = ((K @ covariance[:, g]) * K).sum(-1)
        P += (seen.scale * linear + 0.5 * seen.scale**2 * quadratic).softmax(dim=-1)
    return P / mean.shape[1]


EXPECTED_ATTENTION = evict(
    "expected-attention",
    score,
    watch=Moments,
    rope=True,
)
