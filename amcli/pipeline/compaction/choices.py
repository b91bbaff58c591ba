"""What `auto` stands for: how entries are stored.

The same inputs always give the same choice, and the manifest records it. The measurements behind
the limits are in docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from amcli.entries.matrix import UnstorableError
from amcli.entries.stores import Quantizer, quantizer_of
from amcli.matching.budgets import LayerShape
from amcli.matching.fit_errors import fit_errors
from amcli.models.geometry import LayerGeometry
from amcli.pipeline.compaction.defaults import COARSE, FINE
from amcli.pipeline.contexts.context import Context, live_keys
from amcli.pipeline.queries.reference import LayerReference

HARMLESS = 0.3
"""Mean output error on held-out queries, as a receipt shows it, up to which little is lost: at the
median, at most a tenth of what real documents contribute to the answers of three real models;
above 0.5 half or more is lost (docs/benchmarks/real/real.md)."""

ROUNDING = 0.25
"""Largest relative error of a layer's outputs that rounding its whole cache to COARSE may cause.
Layers of real models reach about a twentieth on average (docs/methods.md); keys that few bits
cannot hold reach far more."""

Changes = Mapping[int, float]
"""How much COARSE changes the outputs of each layer, relative to them: a mean over heads. NaN: it
cannot hold them. Layers of which nothing is known are not in it."""


def holds_every_key(ratio: float, layers: Sequence[LayerShape], beta: bool) -> bool:
    """Whether `ratio` is reached even with an entry for every key, stored as `layers` say."""
    stored = sum(x.stored_bytes([x.tokens] * x.heads, beta) for x in layers)
    return 0 < stored * ratio <= sum(x.full_bytes for x in layers)


def chosen(
    layers: Mapping[int, LayerGeometry],
    holds: Callable[[Mapping[int, str]], bool],
    changes: Callable[[], Changes],
) -> dict[int, str]:
    """The store of each layer, COARSE or FINE, with as little lost as the bytes allow.

    FINE where COARSE changes the outputs by more than ROUNDING, where nothing is known of that,
    and where dimensions do not fit. If there is room for every key, what is left of it goes to the
    layers that COARSE changes most; if FINE has room for every key of all, that is all there is to
    decide.

    holds    whether every key has room in layers stored like this, at the ratio asked for
    changes  measures; called only where its answer is needed
    """
    stores = dict.fromkeys(layers, FINE)
    able = [i for i, layer in layers.items() if fits(COARSE, layer)]
    if not able or holds(stores):
        return stores
    found = changes()
    coarse = [i for i in able if found.get(i, math.nan) <= ROUNDING]  # NaN is not
    stores |= dict.fromkeys(coarse, COARSE)
    if holds(stores):
        for i in sorted(coarse, key=lambda i: -found[i]):
            finer = {**stores, i: FINE}
            stores = finer if holds(finer) else stores
    return stores


def fits(store: str, layer: LayerGeometry) -> bool:
    """Whether a layer's keys and values can be stored like this, by their dimensions."""
    quantizer = quantizer_of(store)
    multiples = (1, 1) if quantizer is None else quantizer.multiples
    dims = (layer.key_dim, layer.value_dim)
    return not any(d % n for d, n in zip(dims, multiples, strict=True))


def coarse_changes(context: Context, held: Mapping[int, LayerReference]) -> dict[int, float]:
    """See `Changes`: as measured on the `held` queries, which may be none."""
    layers = context.loaded.geometry.layers
    return rounding_errors(context, held, {i: COARSE for i in held if fits(COARSE, layers[i])})


class Rounding(NamedTuple):
    """The layer whose outputs its store changes most, and the relative error there."""

    layer: int
    store: str
    error: float


def worst_rounding(
    context: Context, held: Mapping[int, LayerReference], stores: Mapping[int, str]
) -> Rounding | None:
    """What rounding does to the worst of the layers in `held`; None if nothing is rounded."""
    errors = rounding_errors(context, held, stores)
    if not errors:
        return None
    # NaN and infinity count as worse than any number.
    worst = max(errors, key=lambda i: (not math.isfinite(errors[i]), errors[i]))
    return Rounding(worst, stores[worst], errors[worst])


def rounding_errors(
    context: Context, held: Mapping[int, LayerReference], stores: Mapping[int, str]
) -> dict[int, float]:
    """`rounding_error` of the layers in `held` that are stored as codes, by layer."""
    found = {}
    for i in held:
        quantizer = quantizer_of(stores[i]) if i in stores else None
        if quantizer is not None:
            found[i] = float(rounding_error(context, i, held[i], quantizer))
    return found


def rounding_error(
    context: Context, layer: int, held: LayerReference, quantizer: Quantizer
) -> torch.Tensor:
    """Relative output error from rounding a layer's keys and values: mean over heads, 0-d.

    Each head's error is that of `matching.fit_errors` over the `held` queries; NaN where numbers
    cannot be stored like this.
    """
    K, V = live_keys(context, layer)
    try:
        keys = quantizer.round_keys(K, [K.shape[1]] * K.shape[0])
        values = quantizer.round_values(V)
    except UnstorableError:
        output = K.new_full(K.shape[:1], math.nan, dtype=torch.float32)
    else:
        queries = held.sample.queries(K, V)
        output = fit_errors(queries, held.sample.logits, keys, None, values).output.float()
    return context.loaded.shard.gathered(output).mean()
