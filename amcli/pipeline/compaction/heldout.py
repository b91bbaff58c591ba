"""Held-out text: the stored entries are judged by it, and nothing was fitted to it.

A document's facts cannot be held out: scores and fits that never saw a fact lose it, so the
measurement would harm what it measures. What is held out is the way of asking for them. The
reference pass repeats the document in parts as long as it can, each token after all of its
predecessors; here it is repeated in short parts that begin anywhere, so the model has to find each
place again from the compact entries alone, from another question, at other positions, and with
little of its own text to lean on.

The queries of such parts, which no scores, selection or fits have seen, give the errors that a
receipt shows. They are the same for every method, so errors of different methods can be compared.
What is lost of a model's predictions, `fidelity`, is measured on quotes instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from amcli.entries.ragged import Entries
from amcli.matching.fit_errors import FitErrors, fit_errors
from amcli.models.spoken import quoted
from amcli.pipeline.contexts.context import Context, full_layers, live_keys
from amcli.pipeline.queries.passages import Passage
from amcli.pipeline.queries.prompts import REPEAT_FROM
from amcli.pipeline.queries.reference import LayerReference, collect
from amcli.system.progress import Progress

QUERIES = 256
"""Held-out queries per KV head: enough for an error to two digits."""

PLACES = 8
"""Parts of the document that these queries are spread over."""

QUOTED = 12
"""First tokens of a part, quoted in its question: repeating them does not need the document."""


@dataclass(frozen=True)
class Errors:
    """What is known of each layer's heads on held-out queries, `[layer][head]` (`[]`: nothing).

    count      queries per KV head
    mass, output   relative errors of the stored entries, defined as in `matching.fit_errors`
    attention  mean share of the queries' attention that falls on the document
    """

    count: int = 0
    mass: list[list[float]] = field(default_factory=list)
    output: list[list[float]] = field(default_factory=list)
    attention: list[list[float]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The manifest fields that hold them."""
        return {
            "fit_errors": {"mass": self.mass, "output": self.output},
            "attention": self.attention,
        }


def parts(context: Context, size: int, most: int, seed: int) -> list[Passage]:
    """Parts of `size` document tokens from a seeded offset on, each after its question.

    At most `most` of them, a seeded choice. Queries count from the first unquoted token on. Text
    before the first part is left out, as is a last part too short to say much, unless it is the
    only one. Empty where the model's positions leave no room after the context.
    """
    document = context.document
    tokenizer = context.loaded.tokenizer
    generator = torch.Generator().manual_seed(seed)
    # From a quarter to three quarters of a part: well away from where reference passages begin.
    offset = size // 4 + int(torch.randint(max(1, size // 2), (1,), generator=generator))
    if len(document) < offset + size // 2:
        offset = 0
    starts = list(range(offset, max(offset + 1, len(document) - size // 2), size))
    order = torch.randperm(len(starts), generator=generator).tolist()
    found = []
    for start in sorted(starts[i] for i in order[:most]):
        piece = document[start : start + size]
        length = min(QUOTED, len(piece) // 2)
        head = quoted(tokenizer, piece[:length])
        lead = context.lead(REPEAT_FROM.format(start=head))
        found.append(Passage(lead + piece, len(lead) + length, context.T, slice(0, context.T)))
    limit = context.loaded.geometry.max_positions
    if limit is not None and context.T + max(len(p.ids) for p in found) > limit:
        return []
    return found


def queries(context: Context, seed: int, progress: Progress) -> dict[int, LayerReference]:
    """Held-out queries of each full layer: all queries of a few short parts."""
    geometry, full = context.loaded.geometry, full_layers(context)
    group = max((geometry.query_heads[i] // geometry.layers[i].kv_heads for i in full), default=0)
    if not group:
        return {}
    tokens = -(-QUERIES // group)
    passages = parts(context, QUOTED + -(-tokens // PLACES), PLACES, seed)
    if not passages:
        return {}
    return collect(context, passages, max_queries=QUERIES, seed=seed, kinds=(), progress=progress)


def measure(
    context: Context, layers: Sequence[Entries], held: Mapping[int, LayerReference]
) -> Errors:
    """Errors of the stored entries of all layers on the held-out queries."""
    found, shard = Errors(max((h.count for h in held.values()), default=0)), context.loaded.shard
    for i, heads in enumerate(layers):
        mass = output = attention = torch.full((1,), torch.nan, device=context.loaded.device)
        if i in held:
            mine = shard.mine(heads).unpack()
            mass, output = errors(held[i], *live_keys(context, i), mine)
            attention = held[i].sample.weights.float().mean(1)
        found.mass.append(_finite(shard.gathered(mass)))
        found.output.append(_finite(shard.gathered(output)))
        found.attention.append(_finite(shard.gathered(attention)))
    return found


def errors(held: LayerReference, K: torch.Tensor, V: torch.Tensor, heads: Entries) -> FitErrors:
    """Relative errors of one layer's entries, each `[H]`; 1 for an empty head.

    `K [H, T, d]`, `V [H, T, dv]`: the whole document. One pass over all heads, padded to the
    longest.
    """
    C_k, C_v, beta, mask = _padded(heads)  # [H, t, d], [H, t, dv], [H, t], [H, t]
    return fit_errors(held.sample.queries(K, V), held.sample.logits, C_k, beta, C_v, mask=mask)


def _padded(
    heads: Entries,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entries as `[H, longest, ...]`, zero where padded, and the mask of the real ones."""
    H, longest = len(heads.lengths), max(1, *heads.lengths)
    device, flat_keys, flat_values = heads.device, heads.keys.unpack(), heads.values.unpack()
    lengths = torch.tensor(heads.lengths, device=device)
    mask = torch.arange(longest, device=device) < lengths.unsqueeze(1)  # [H, longest]
    keys = flat_keys.new_zeros((H, longest, heads.key_dim))
    values = flat_values.new_zeros((H, longest, heads.value_dim))
    beta = torch.zeros((H, longest), device=device)
    keys[mask], values[mask] = flat_keys, flat_values
    if heads.beta is not None:
        beta[mask] = heads.beta
    return keys, values, beta, mask


def _finite(values: torch.Tensor) -> list[float]:
    """Each head's number to six digits; empty when any is not finite."""
    if not bool(values.isfinite().all()):
        return []
    return [float(f"{v:.6g}") for v in values.tolist()]
