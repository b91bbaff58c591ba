"""What SnapKV, PyramidKV and TOVA score by: the queries of the context's last tokens."""

from __future__ import annotations

import torch

from amcli.matching.methods import Look, ScoreContext
from amcli.matching.scores import ScoreState
from amcli.matching.tiles import Logits

WINDOW = 64
"""Queries kept: SnapKV's window in kvpress and in PyramidKV (its paper: 32)."""


class LastQueries:
    """Keeps the queries it is shown: `window` of the method bounds the pass to the last tokens.

    Q `[H, G, w, d]`, with the scale and softcap of their logits (None before the first).
    """

    def __init__(self) -> None:
        self.Q: torch.Tensor | None = None
        self.logits: Logits | None = None

    def update(self, look: Look) -> None:
        """Appends the queries of more tokens."""
        # Copied: a view would keep the queries of the whole forward pass alive.
        self.Q = look.Q.clone() if self.Q is None else torch.cat([self.Q, look.Q], dim=2)
        self.logits = look.logits

    def attention(self, K: torch.Tensor, count: int) -> torch.Tensor:
        """`[H, T]`: mean softmax of the last `count` tokens' queries over a KV head's group.

        The softmax is that of the prefill: over all keys up to the query's own. Raises ValueError
        when nothing was watched.
        """
        if self.Q is None or self.logits is None:
            raise ValueError("no queries were watched")
        H, T, _ = K.shape
        Q = self.Q[:, :, -count:]
        _, G, w, _ = Q.shape
        limit = torch.arange(T - w + 1, T + 1, device=K.device).repeat(G)
        state = ScoreState(H, T, device=K.device, kinds=["mean"])
        state.update(Q.flatten(1, 2), K, self.logits, limit=limit)
        return state.scores("mean")


def attention(ctx: ScoreContext, count: int) -> torch.Tensor:
    """`LastQueries.attention` of the layer that `ctx` is about."""
    if not isinstance(ctx.watched, LastQueries):
        raise ValueError("the method watches the context's last queries, and none were given")
    return ctx.watched.attention(ctx.K, count)
