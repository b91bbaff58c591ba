"""Writing an artifact while its layers are still being fitted.

The number of entries of each head is known before the fits, so every tensor has its place in the
file; the manifest comes last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from amcli.entries.ragged import Entries
from amcli.entries.stores import quantizer_of
from amcli.matching.budgets import Lengths
from amcli.pipeline.compaction.plan import LayerPlan, Plan
from amcli.pipeline.contexts.context import Context, dense, full_layers
from amcli.storage.artifacts import NewArtifact, named, named_entries, spec
from amkv_format import layer_tensor

Done = Callable[[int, Entries, torch.Tensor | None], None]
"""Takes a layer's index, its entries, and their positions if those are stored."""


def begin(new: NewArtifact, context: Context, plan: Plan, lengths: Lengths) -> Done:
    """Declares the tensors of a compaction to these `lengths` and writes those already known.

    Returns a function that writes those of a finished layer.
    """
    full, places = full_layers(context), {}
    rows = {i: sum(heads) for i, heads in zip(full, lengths, strict=True)}
    plans = {x.layer: x for x in plan.layers}
    layers: list[Entries] = []
    for i in range(len(context.loaded.geometry.layers)):
        live = dense(context.cache, i)
        layers.append(_none_yet(live, plans[i], plan.method.has_beta) if i in rows else live)
    if plan.positions:
        places = {i: torch.empty(0, dtype=torch.int32) for i in full}
    tensors = dict(named(context.ids, layers, context.cache.get_states(), places))
    coming = {name: rows[i] for i in full for name, _ in named_entries(i, layers[i])}
    coming |= {layer_tensor(i, "positions"): rows[i] for i in places}
    new.begin([spec(name, x, coming.get(name)) for name, x in tensors.items()])
    for name in tensors.keys() - coming.keys():
        new.put(name, tensors[name])

    def done(layer: int, heads: Entries, found: torch.Tensor | None) -> None:
        for name, tensor in named_entries(layer, heads):
            new.put(name, tensor)
        if found is not None:
            new.put(layer_tensor(layer, "positions"), found)

    return done


def _none_yet(like: Entries, plan: LayerPlan, has_beta: bool) -> Entries:
    """Zero entries, with the tensors and types that the layer's entries will have."""
    beta = torch.empty(0, dtype=torch.float32, device=like.device) if has_beta else None
    heads = replace(like.rows(slice(0, 0), (0,) * len(like.lengths)), beta=beta)
    quantizer = quantizer_of(plan.store)
    return heads if quantizer is None else quantizer.pack(heads)
