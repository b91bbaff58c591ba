"""How far kept entries are from the whole document on given queries, in mass and in output."""

from __future__ import annotations

from typing import NamedTuple

import torch

from amcli.matching.sample import Queries
from amcli.matching.scores import Stats, attention_stats
from amcli.matching.tiles import TILE_ELEMENTS, Logits, hide, working_dtype


class FitErrors(NamedTuple):
    """Relative errors per head, each `[H]`.

    mass    `sqrt(Σ W²(m̂/m - 1)² / Σ W²)`
    output  `sqrt(Σ W‖Ŷ - Y‖² / Σ W‖Y‖²)`
    """

    mass: torch.Tensor
    output: torch.Tensor


def fit_errors(
    queries: Queries,
    logits: Logits,
    C_k: torch.Tensor,
    beta: torch.Tensor | None,
    C_v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    rest: Stats | None = None,
    tile: int = TILE_ELEMENTS,
) -> FitErrors:
    """Errors of entries `C_k [H, t, d]`, `beta [H, t]`, `C_v [H, t, dv]`, in one pass.

    `rest`: the queries' attention to further kept entries. `mask [H, t]` marks real entries.
    """
    if mask is None:
        mask = torch.ones(C_k.shape[:2], dtype=torch.bool, device=C_k.device)
    bias = hide(beta, mask, working_dtype(queries.Q, C_k))
    found = attention_stats(queries.Q, C_k, C_v, logits, bias=bias, tile=tile)
    if rest is not None:
        found = found.merged(rest)
    lse, out = found
    tiny = torch.finfo(lse.dtype).tiny  # a head that no query looks at
    W = queries.weights.to(lse)
    missed = (W.square() * torch.expm1(lse - queries.lse).square()).sum(1)
    mass = (missed / W.square().sum(1).clamp_min(tiny)).sqrt()
    Y = queries.Y.to(out.dtype)
    wrong = (W * (out - Y).square().sum(-1)).sum(1)
    size = (W * Y.square().sum(-1)).sum(1)
    return FitErrors(mass, (wrong / size.clamp_min(tiny)).sqrt())
