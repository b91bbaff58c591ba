"""H2O: heavy hitters, the keys that the prompt's own queries attended to most in total.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models", arXiv 2306.14048. Half of the budget goes to the most recent tokens, half to the
largest accumulated mass. The paper evicts as it generates; here the mass of the whole prefill
is accumulated and the rule applied once. The mass is not divided by the number of queries that
could see a key, so early keys have longer to collect it, as in the paper.
"""

from __future__ import annotations

import torch

from amcli.matching.baselines.evicting import evict, keep
from amcli.matching.methods import Look, ScoreContext
from amcli.matching.scores import ScoreState


class Mass:
    """Softmax mass that each key got from the causal queries so far; see `ScoreState`."""

    def __init__(self) -> None:
        self.state: ScoreState | None = None

    def update(self, look: Look) -> None:
        """Adds the probabilities of more queries."""
        H, T, _ = look.K.shape
        if self.state is None:
            self.state = ScoreState(H, T, device=look.K.device, kinds=["mean"])
        Q, limit, _ = look.rows()
        self.state.update(Q, look.K, look.logits, limit=limit)


def score(ctx: ScoreContext) -> torch.Tensor:
    """Accumulated mass over the heads of a group; the last tokens get half of the entries."""
    if not isinstance(ctx.watched, Mass) or ctx.watched.state is None:
        raise ValueError("h2o watches the context's own queries, and none were given")
    # The mean over rows is the sum, up to a factor common to all keys of a layer.
    return keep(ctx.watched.state.scores("mean"), ctx.last(ctx.entries // 2))


H2O = evict("h2o", score, watch=Mass)
