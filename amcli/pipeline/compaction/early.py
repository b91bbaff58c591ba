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
from amcli.pipeline.compaction.packing import packed, whole_layer
from amcli.pipeline.compaction.plan import Plan
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
    heads_of = dict(zip(full, lengths, strict=True))
    layers: list[Entries] = []
    for i in range(len(context.loaded.geometry.layers)):
        if i in heads_of:
            layers.append(_none_yet(dense(context.cache, i), plan, i))
        else:
            layers.append(whole_layer(context, plan, i))
    if plan.positions:
        places = {i: torch.empty(0, dtype=torch.int32) for i in full}
    tensors = dict(named(context.ids, layers, context.cache.get_states(), places))
    coming = {layer_tensor(i, "positions"): sum(heads_of[i]) for i in places}
    for i, heads in heads_of.items():
        quantizer = quantizer_of(layers[i].store)
        for name in layers[i].tensors():
            rows = sum(heads) if quantizer is None else quantizer.tensor_rows(name, heads)
            coming[layer_tensor(i, name)] = rows
    new.begin([spec(name, x, coming.get(name)) for name, x in tensors.items()])
    for name in tensors.keys() - coming.keys():
        new.put(name, tensors[name])

    def done(layer: int, heads: Entries, found: torch.Tensor | None) -> None:
        for name, tensor in named_entries(layer, heads):
            new.put(name, tensor)
        if found is not None:
            new.put(layer_tensor(layer, "positions"), found)

    return done


def _none_yet(like: Entries, plan: Plan, layer: int) -> Entries:
    """Zero entries, with the tensors and types that the layer's entries will have."""
    has_beta = plan.method.has_beta
    beta = torch.empty(0, dtype=torch.float32, device=like.device) if has_beta else None
    heads = like.rows([slice(0, 0)], (0,) * len(like.lengths))
    return packed(plan, layer, replace(heads, beta=beta))
