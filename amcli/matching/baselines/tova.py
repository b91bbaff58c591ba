"""TOVA: what the last query attends to, averaged over all heads of a layer.

Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104. All heads of a layer keep
the same tokens. The paper drops one token at each step; here, as in kvpress, the rule is
applied once, after the context has been read.
"""

from __future__ import annotations

import torch

from amcli.matching.baselines.evicting import evict, keep
from amcli.matching.baselines.last_queries import LastQueries, attention
from amcli.matching.methods import ScoreContext


def score(ctx: ScoreContext) -> torch.Tensor:
    """Softmax of the last query, averaged over all heads; the last token is kept."""
    P = attention(ctx, 1).mean(dim=0, keepdim=True)  # [1, T]
    return keep(P.expand(ctx.K.shape[0], -1), ctx.last(1))


TOVA = evict(
    "tova",
    score,
    watch=LastQueries,
    window=1,
)
