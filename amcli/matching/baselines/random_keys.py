"""Random eviction: the baseline any method has to beat. Every head draws its own keys."""

from __future__ import annotations

import torch

from amcli.matching.baselines.evicting import evict
from amcli.matching.methods import ScoreContext


def score(ctx: ScoreContext) -> torch.Tensor:
    """Uniform in [0, 1), a function of only the seed and the layer, the same on every device."""
    generator = torch.Generator().manual_seed((ctx.seed + 1) * 1_000_003 + ctx.layer)
    return torch.rand(ctx.K.shape[:2], generator=generator).to(ctx.K.device)


RANDOM = evict("random", score)
