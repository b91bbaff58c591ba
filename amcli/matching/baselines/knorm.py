"""Knorm: keys of small norm draw attention.

Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
arXiv 2406.11430. The paper leaves the first two layers whole; here, as in kvpress, every layer
is treated alike, so that the ratio is the same in each.
"""

from __future__ import annotations

import torch

from amcli.matching.baselines.evicting import evict
from amcli.matching.methods import ScoreContext


def score(ctx: ScoreContext) -> torch.Tensor:
    """`-‖k‖₂`."""
    norms: torch.Tensor = torch.linalg.vector_norm(ctx.K.float(), dim=-1)
    return -norms


KNORM = evict("knorm", score)
