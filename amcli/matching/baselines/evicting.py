"""What eviction methods share: keep the best keys of each head with their own values, no bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from amcli.matching.methods import BudgetKind, Method, ScoreFunction, WatchFunction

ALWAYS = torch.inf
"""Score of a key that a method keeps, whatever the others score."""


def evict(
    name: str,
    score: ScoreFunction,
    *,
    watch: WatchFunction | None = None,
    source: str = "context",
    window: int | None = None,
    rope: bool = False,
    rerotate: bool = False,
    budget: BudgetKind = "uniform",
) -> Method:
    """A method that only ranks keys; see `Method` for the arguments.

    `score(ctx) -> [H, T]`, larger is better. With `watch` it sees the queries of `source`, without
    it no queries at all.
    """
    return Method(
        name=name,
        score=score,
        queries=watch is not None,
        source=source,
        watch=watch,
        window=window,
        rope=rope,
        selection="top",
        mass="none",
        values="original",
        budget=budget,
        rerotate=rerotate,
    )


def keep(scores: torch.Tensor, *always: torch.Tensor) -> torch.Tensor:
    """`scores [H, T]` with the keys marked in any of `always [T]` (bool) put before all others."""
    marked: Sequence[torch.Tensor] = always
    for mask in marked:
        scores = scores.masked_fill(mask, ALWAYS)
    return scores
