"""Attention Matching with the most attended keys, as its paper has it.

Zweiger et al., arXiv 2602.16284: keys by the root mean square of the reference queries' softmax
over the context; biases by least squares clamped to `w` in [e⁻³, e³], then two projected
gradient steps; values by least squares. See `least_squares`.
"""

from __future__ import annotations

from functools import partial
from math import exp

import torch

from amcli.matching.baselines.least_squares import fit_layer, least_squares, row_max
from amcli.matching.methods import Method, ScoreContext
from amcli.matching.sample import Queries
from amcli.matching.scores import ScoreState
from amcli.matching.selection import top
from amcli.matching.tiles import TILE_ELEMENTS, Logits, gather_rows, normal_equations, solve_dtype

BETA_RANGE = (-3.0, 3.0)
STEPS = 2


def score(ctx: ScoreContext) -> torch.Tensor:
    """Root mean square over the reference queries of their softmax over the context's keys."""
    if ctx.Q is None:
        raise ValueError("am-highest-attention needs reference queries")
    Q = ctx.Q

    def rms() -> torch.Tensor:
        state = ScoreState(ctx.K.shape[0], ctx.K.shape[1], device=ctx.K.device, kinds=["rms"])
        state.update(Q, ctx.K, ctx.logits)
        return state.scores("rms")

    return ctx.sample.once("am-highest-attention", rms)


def bounded_weights(G: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Clamped least squares, then STEPS projected gradient steps of length 1/‖G‖: `w [B, t]`."""
    low, high = exp(BETA_RANGE[0]), exp(BETA_RANGE[1])
    w = least_squares(G, b, torch.ones_like(b, dtype=torch.bool)).clamp(low, high)
    curvature = torch.linalg.matrix_norm(G, 2).clamp_min(torch.finfo(G.dtype).tiny)  # [B]
    for _ in range(STEPS):
        gradient = torch.bmm(G, w.unsqueeze(2)).squeeze(2) - b
        w = (w - gradient / curvature.unsqueeze(1)).clamp(low, high)
    return w


def weigh(
    queries: Queries, logits: Logits, K: torch.Tensor, scores: torch.Tensor, t: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(index [B, t], beta [B, t])`: the best keys by score, and their biases."""
    index = top(scores, [t] * len(scores)).index
    highest = row_max(queries.Q, K, logits)  # [B, n]
    m = (queries.lse - highest).exp().unsqueeze(-1)
    exact = queries.Q.to(solve_dtype(K.device))
    G, b = normal_equations(
        exact, gather_rows(K, index), highest, torch.ones_like(highest), m, logits, None,
        TILE_ELEMENTS,
    )  # fmt: skip
    return index, bounded_weights(G, b.squeeze(-1)).log()


AM_HIGHEST_ATTENTION = Method(
    name="am-highest-attention",
    score=score,
    selection="top",
    mass="nnls",
    values="least-squares",
    budget="uniform",
    fit=partial(fit_layer, weigh),
)
