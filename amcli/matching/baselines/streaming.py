"""StreamingLLM: the first tokens, which serve as attention sinks, and the most recent ones.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453: four
sinks, and positions counted within the cache. Keys are stored after RoPE, so the kept ones are
rotated to the positions just before the first new token: the sinks come as close as if there had
been nothing in between.
"""

from __future__ import annotations

import torch

from amcli.matching.baselines.evicting import evict, keep
from amcli.matching.methods import SINKS, ScoreContext


def score(ctx: ScoreContext) -> torch.Tensor:
    """Later is better, the sinks best; with fewer than five entries, one goes to the last token."""
    H, T, _ = ctx.K.shape
    position = torch.arange(T, dtype=torch.float32, device=ctx.K.device).expand(H, -1)
    return keep(position, ctx.first(min(SINKS, max(0, ctx.entries - 1))))


STREAMING = evict("streaming", score, rerotate=True)
