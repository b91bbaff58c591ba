"""Held-out reference queries: what the stored entries miss on queries that no fit has seen.

Selection, mass fit and value fit work on one part of a layer's sampled reference queries; the
errors that a user reads are those on the other part. Scores and budgets use all of them: they
look at each query for its largest probability only, and rare facts must not be left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from amcli.matching.mass import mass_error
from amcli.matching.scores import attention_stats
from amcli.matching.values import output_error
from amcli.pipeline.reference import LayerReference
from amcli.ragged import RaggedHeads

SHARE = 8
"""One in so many sampled tokens is held out."""

MOST = 256
"""Held-out queries per KV head at most: enough for an error of two digits."""


@dataclass(frozen=True)
class Sample:
    """Reference queries of one layer: `Q [H, n, d]` and their `weights [H, n]`."""

    Q: torch.Tensor
    weights: torch.Tensor


def to_sample(max_queries: int) -> int:
    """How many queries to sample so that `max_queries` are left for the fits."""
    return max_queries + min(MOST, max_queries // (SHARE - 1))


def split(found: LayerReference, group: int, seed: int) -> tuple[Sample, Sample]:
    """`(fit, held)`: a seeded share of the sampled tokens is held out.

    All `group` query heads of a token go the same way, and the same tokens in every layer. With
    fewer than two tokens nothing is held out.
    """
    token = _tokens(found, group)
    count = int(token.max()) + 1 if token.numel() else 0
    held = min(max(1, count // SHARE), max(1, MOST // group)) if count > 1 else 0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    out = torch.zeros(count, dtype=torch.bool)
    out[order[:held]] = True
    Q, W = found.Q, found.weights
    apart = out[token].to(Q.device)
    return Sample(Q[:, ~apart], W[:, ~apart]), Sample(Q[:, apart], W[:, apart])


def _tokens(found: LayerReference, group: int) -> torch.Tensor:
    """`[n]`: the sampled token of each row. A chunk's rows run over query heads, then tokens."""
    rows: list[torch.Tensor] = []
    first = 0
    for part in found.parts:
        tokens = part.shape[1] // group
        rows.append(torch.arange(first, first + tokens).repeat(group))
        first += tokens
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)


def errors(
    held: Sample,
    K: torch.Tensor,
    V: torch.Tensor,
    heads: RaggedHeads,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative `(mass, output)` errors of the stored entries on held-out queries, each `[H]`.

    `K [H, T, d]`, `V [H, T, dv]`: the whole document. Defined as in `matching.compact`'s
    `LayerResult`; 1 for a head without entries. One pass over all heads, padded to the longest.
    """
    lse, Y = attention_stats(held.Q, K, V, scale, softcap=softcap)
    C_k, C_v, beta, mask = _padded(heads)  # [H, t, d], [H, t, dv], [H, t], [H, t]
    mass = mass_error(
        held.Q, C_k, beta, lse, scale, softcap=softcap, weights=held.weights, mask=mask
    )
    output = output_error(
        held.Q, C_k, beta, C_v, Y, scale, softcap=softcap, weights=held.weights, mask=mask
    )
    return mass, output


def _padded(
    heads: RaggedHeads,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entries as `[H, longest, ...]`, zero where padded, and the mask of the real ones."""
    H, longest = len(heads.lengths), max(1, *heads.lengths)
    device = heads.keys.device
    lengths = torch.tensor(heads.lengths, device=device)
    mask = torch.arange(longest, device=device) < lengths.unsqueeze(1)  # [H, longest]
    keys = heads.keys.new_zeros((H, longest, heads.keys.shape[1]))
    values = heads.values.new_zeros((H, longest, heads.values.shape[1]))
    beta = torch.zeros((H, longest), device=device)
    keys[mask], values[mask] = heads.keys, heads.values
    if heads.beta is not None:
        beta[mask] = heads.beta
    return keys, values, beta, mask
