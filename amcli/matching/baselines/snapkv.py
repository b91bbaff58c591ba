"""SnapKV: what the last queries of the prompt look at, smoothed, and the last tokens themselves.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469. The
softmax of the last `w` queries is averaged over queries and the heads of a group, pooled over
neighbours, and the `w` tokens of the window are kept (`w` = 64 and average pooling of 5 as in
kvpress; the paper sums 32 queries and pools 7 by maximum or average).

The paper's caches hold a thousand entries and more. Where the window would be most of what is
kept, it shrinks to `1/SHARE` of the entries, so that the scores decide the rest.
"""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool1d

from amcli.matching.baselines.evicting import evict, keep
from amcli.matching.baselines.last_queries import WINDOW, LastQueries, attention
from amcli.matching.methods import ScoreContext

KERNEL = 5
"""Number of neighbours averaged: facts are spans, and their single tokens are useless."""

SHARE = 4
"""Without a window set by the user, the window takes at most one in SHARE of a head's entries."""


def score(ctx: ScoreContext) -> torch.Tensor:
    """Pooled mean softmax of the window's queries; the window is kept, its end first."""
    T = ctx.K.shape[1]
    window = min(T, ctx.window or min(WINDOW, max(1, ctx.entries // SHARE)))
    before = attention(ctx, window)[:, : T - window]
    # The padding counts as zeros; the window's own probabilities stay out of the pooling.
    pooled = avg_pool1d(before, KERNEL, stride=1, padding=KERNEL // 2) if window < T else before
    scores = torch.nn.functional.pad(pooled, (0, window))
    # A window that a user set larger than the budget loses its oldest tokens.
    return keep(scores, ctx.last(min(window, max(1, ctx.entries))))


SNAPKV = evict(
    "snapkv",
    score,
    watch=LastQueries,
    window=WINDOW,
)
