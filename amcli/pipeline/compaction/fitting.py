"""From scores and budgets to the entries of every layer, as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from amcli.entries.matrix import Numbers
from amcli.entries.ragged import Entries
from amcli.entries.stores import quantizer_of
from amcli.matching.budgets import Lengths
from amcli.matching.layers import compact_layers
from amcli.matching.methods import LayerInput, LayerResult
from amcli.matching.sample import Sample
from amcli.matching.tiles import Logits, room_on
from amcli.models.rotary import Rotary
from amcli.pipeline.compaction.early import Done
from amcli.pipeline.compaction.packing import in_layer, packed, storable, whole_layer
from amcli.pipeline.compaction.plan import Plan
from amcli.pipeline.contexts.context import Context, full_layers, live_keys
from amcli.pipeline.queries.reference import LayerReference
from amcli.system.progress import Progress


def fit(
    context: Context,
    plan: Plan,
    references: Mapping[int, LayerReference],
    scores: Sequence[torch.Tensor],
    lengths: Lengths,
    rotary: Rotary | None,
    progress: Progress,
    done: Done | None = None,
) -> tuple[list[Entries], dict[int, torch.Tensor]]:
    """The entries of all heads of every layer, each in its store; of sliding layers all of them.

    Also, where positions are asked for, the token that each entry of a compacted layer was taken
    from, `[N]` int32.

    scores   of this process's heads, a tensor `[H, T]` for each layer in `full_layers`
    lengths  of all heads, a list for each of those layers
    done     called as soon as such a layer is finished, with this process's heads and any
             positions

    Raises UsageError for a layer whose numbers its store cannot hold.
    """
    shard, full, method = context.loaded.shard, full_layers(context), plan.method
    inputs = []
    for layer, part, chosen in zip(full, scores, lengths, strict=True):
        mine = chosen[shard.rank * len(part) : (shard.rank + 1) * len(part)]
        inputs.append(_input(context, references.get(layer), layer, part, mine))
    progress.start("compact heads", sum(len(layer.lengths) for layer in inputs))
    found: dict[int, Entries] = {}
    positions: dict[int, torch.Tensor] = {}
    with storable(full):
        for place, result in _results(plan, inputs, progress.advance):
            layer = full[place]
            if method.rerotate and rotary is not None:
                result = _rerotate(result, rotary, layer, context.T)
            with in_layer(place):
                found[layer] = packed(plan, layer, result.heads)
            if plan.positions:
                positions[layer] = result.index
            if done is not None:
                done(layer, found[layer], positions.get(layer))
    # In layer order: each process may finish its layers in a different order.
    positions = {layer: shard.gathered(positions[layer]) for layer in full if layer in positions}
    layers = [
        shard.whole(found[layer] if layer in found else whole_layer(context, plan, layer))
        for layer in range(len(context.loaded.geometry.layers))
    ]
    return layers, positions


def _input(
    context: Context,
    found: LayerReference | None,
    layer: int,
    scores: torch.Tensor,
    lengths: list[int],
) -> LayerInput:
    K, V = live_keys(context, layer)
    return LayerInput(sample_of(found, K), K, V, scores, lengths)


def _results(
    plan: Plan, layers: Sequence[LayerInput], advance: Callable[[int], None]
) -> Iterator[tuple[int, LayerResult]]:
    """Fits by the method's own fit, one layer at a time, or by `compact_layers`."""
    method = plan.method
    # Keys rotated after the fit are rounded once, after the rotation.
    roundings = [None if method.rerotate else quantizer_of(x.store) for x in plan.layers]
    if method.fit is None:
        room = None
        if plan.memory_limit is not None and layers:
            room = room_on(layers[0].K.device, plan.memory_limit)
        yield from compact_layers(
            method, layers, seed=plan.seed, roundings=roundings, room=room, advance=advance
        )
        return
    for i, (x, rounding) in enumerate(zip(layers, roundings, strict=True)):
        with in_layer(i):
            result = method.fit(x, rounding)
        advance(len(x.lengths))
        yield i, result


def _rerotate(result: LayerResult, rotary: Rotary, layer: int, T: int) -> LayerResult:
    """The same entries with each head's keys rotated to the last positions before `T`."""
    lengths = result.heads.lengths
    positions = torch.cat([torch.arange(T - t, T) for t in lengths])
    keys = result.heads.keys.unpack()
    plain = rotary.unrotate(layer, keys, result.index.long())
    turned = rotary.rotate(layer, plain, positions).to(keys.dtype)
    # A key whose position does not change keeps its exact value.
    moved = (positions.to(keys.device) != result.index).unsqueeze(1)
    keys = torch.where(moved, turned, keys)
    return replace(result, heads=replace(result.heads, keys=Numbers(keys)))


def sample_of(found: LayerReference | None, K: torch.Tensor) -> Sample:
    """A layer's sample; for a method without reference queries an empty one, with usual logits."""
    return Sample(K[:, :0], None, Logits(K.shape[-1] ** -0.5)) if found is None else found.sample
