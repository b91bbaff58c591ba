"""The fits of Attention Matching as in its paper, shared by both of its methods here.

Zweiger et al., "Fast KV Compaction via Attention Matching", arXiv 2602.16284, section 3. The
masses of each query are divided by its largest single one: `Φ_ij = exp(s_ij - max_j s_ij)`,
target `m_i = Σ_j Φ_ij`, so a query with one sharp key has a target near 1, and one that spreads
over everything has a target of up to `T` and counts for that much more. Otherwise all reference
queries count alike; `weights` affect only the reported errors, defined as for every other method.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from amcli.entries.ragged import Entries
from amcli.matching.bucket import round_whole
from amcli.matching.fit_errors import fit_errors
from amcli.matching.methods import LayerInput, LayerResult, Rounding
from amcli.matching.sample import Queries
from amcli.matching.tiles import TILE_ELEMENTS, Logits, gather_rows, row_size, solve_dtype, spans
from amcli.matching.values import fit_values

_JITTER = 1e-12  # on a unit diagonal: keeps float64 from breaking down, too small to regularise
_SAFE_JITTER = 1e-8  # for matrices that are singular in float64


class Weigh(Protocol):
    """Selects keys for some heads of equal length and gives their biases."""

    def __call__(
        self, queries: Queries, logits: Logits, K: torch.Tensor, scores: torch.Tensor, t: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(index [B, t], beta [B, t])` for the queries of `B` heads with keys `K [B, T, d]` and
        `scores [B, T]`."""


def least_squares(G: torch.Tensor, b: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """`argmin ½wᵀGw - bᵀw` without bounds, `[B, t]`; 0 where not `used [B, t]`.

    By Cholesky of `G [B, t, t]` (float64, positive semidefinite) scaled to unit diagonal.
    """
    diagonal = G.diagonal(dim1=1, dim2=2)
    real = used & (diagonal > 0)
    D = torch.where(real, diagonal, torch.ones_like(diagonal)).rsqrt()
    pair = real.unsqueeze(2) & real.unsqueeze(1)
    scaled = torch.where(pair, G * D.unsqueeze(2) * D.unsqueeze(1), torch.zeros_like(G))
    scaled.diagonal(dim1=1, dim2=2).add_(torch.where(real, _JITTER, 1.0))
    L, info = torch.linalg.cholesky_ex(scaled)
    if bool((info > 0).any()):
        scaled.diagonal(dim1=1, dim2=2).add_(_SAFE_JITTER)
        safe, _ = torch.linalg.cholesky_ex(scaled)
        L = torch.where((info > 0).view(-1, 1, 1), safe, L)
    rhs = torch.where(real, b * D, torch.zeros_like(b)).unsqueeze(2)
    w: torch.Tensor = torch.cholesky_solve(rhs, L).squeeze(2) * D
    return torch.where(used, w, torch.zeros_like(w))


def row_max(
    Q: torch.Tensor, K: torch.Tensor, logits: Logits, tile: int = TILE_ELEMENTS
) -> torch.Tensor:
    """The largest logit of each query over all keys, `[H, n]`."""
    H, n, _ = Q.shape
    parts = [logits(Q[:, r], K).amax(-1) for r in spans(n, row_size(n, H * K.shape[1], tile))]
    return torch.cat(parts, dim=1)


def fit_layer(weigh: Weigh, layer: LayerInput, rounding: Rounding | None = None) -> LayerResult:
    """Compacts one layer: `weigh` selects keys and gives their beta, then values are fitted.

    Heads of equal length go together. A head that keeps all keys, or none, needs no fit. Like
    `compact_layer`, except that biases are fitted to the keys before `rounding`, since they come
    out of the selection. Raises ValueError where a fit has no queries.
    """
    K, V, lengths, logits = layer.K, layer.V, layer.lengths, layer.sample.logits
    H, T, _ = K.shape
    asked = layer.sample.queries(K, V)
    rows: list[tuple[torch.Tensor, ...]] = [()] * H
    for t in sorted(set(lengths)):
        heads = [h for h in range(H) if lengths[h] == t]
        queries = asked.of(heads)
        if t in (0, T):
            found = _unfitted(K[heads], V[heads], t)
            if t and rounding is not None:
                keys, values, *errors = round_whole(rounding, queries, logits, K[heads], V[heads])
                found = (keys, values, *found[2:4], *errors)
        else:
            if not queries.count:
                raise ValueError("the fits need reference queries")
            index, beta = weigh(queries, logits, K[heads], layer.scores[heads], t)
            order = index.argsort(dim=1)
            index, beta = index.gather(1, order), beta.gather(1, order)
            found = _fitted(queries, logits, K[heads], V[heads], index, beta, rounding)
        for i, h in enumerate(heads):
            rows[h] = tuple(x[i] for x in found)
    keys, values, beta, index = (torch.cat(parts) for parts in list(zip(*rows, strict=True))[:4])
    mass, output = (torch.stack(parts) for parts in list(zip(*rows, strict=True))[4:])
    entries = Entries.of(keys, values, beta.float(), tuple(int(t) for t in lengths))
    return LayerResult(entries, index.to(torch.int32), mass.float(), output.float())


def _unfitted(K: torch.Tensor, V: torch.Tensor, t: int) -> tuple[torch.Tensor, ...]:
    """Heads that keep all of their keys (t = T), or none."""
    B = K.shape[0]
    index = torch.arange(t, device=K.device).expand(B, -1)
    error = torch.full((B,), 0.0 if t else 1.0, device=K.device)
    return K[:, :t], V[:, :t], torch.zeros((B, t), device=K.device), index, error, error


def _fitted(
    queries: Queries,
    logits: Logits,
    K: torch.Tensor,
    V: torch.Tensor,
    index: torch.Tensor,
    beta: torch.Tensor,
    rounding: Rounding | None,
) -> tuple[torch.Tensor, ...]:
    """`(keys, values, beta, index, mass error, output error)` with least-squares values."""
    keys, originals = gather_rows(K, index), gather_rows(V, index)
    if rounding is not None:
        B, t = index.shape  # already in order of position
        keys, originals = rounding.round_keys(keys, [t] * B), originals.float()
    # In the precision of the solve: without regularisation, rounding would become noise.
    exact = solve_dtype(K.device)
    alike = replace(queries, Q=queries.Q.to(exact), Y=queries.Y.to(exact), W=None)
    values = fit_values(alike, logits, keys, beta.to(exact), originals, lam=0.0)
    if rounding is not None:
        values = rounding.round_values(values)
    error = fit_errors(queries, logits, keys, beta.float(), values)
    return keys, values, beta, index, *error
