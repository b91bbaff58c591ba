"""KeyDiff: keeps the keys that differ most from the others.

Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
Resource-Constrained Environments", arXiv 2504.15364. The paper evicts block after block while
it prefills; here, as in kvpress without its block wrapper, once over the whole context.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity, normalize

from amcli.matching.baselines.evicting import evict
from amcli.matching.methods import ScoreContext


def score(ctx: ScoreContext) -> torch.Tensor:
    """`-cos(k, mean of the normalised keys)`, head by head."""
    K = ctx.K.float()
    anchor = normalize(K, dim=-1).mean(dim=1, keepdim=True)  # [H, 1, d]
    return -cosine_similarity(K, anchor, dim=-1)


KEYDIFF = evict("keydiff", score)
