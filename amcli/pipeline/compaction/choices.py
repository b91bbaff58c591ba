"""What `auto` stands for: how entries are stored.

The same inputs always give the same choice, and the manifest records it. The measurements behind
the limits are in docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from amcli.entries.catalogue import NATIVE
from amcli.entries.stores import Quantizer, quantizer_of
from amcli.matching.budgets import LayerShape
from amcli.matching.fit_errors import fit_errors
from amcli.pipeline.contexts.context import Context, full_layers, live_keys
from amcli.pipeline.queries.reference import LayerReference

HARMLESS = 0.3
"""Mean output error on held-out queries, as a receipt shows it, up to which little is lost: at the
median, at most a tenth of what real documents contribute to the answers of three real models;
above 0.4 a seventh or more is lost (docs/benchmarks/real/real.md)."""

ROUNDING = 0.25
"""Largest relative error of a layer's outputs that rounding the whole cache to 4 bits may cause.
The worst layers of pocket and olmo2 reach 0.07 to 0.12, that of llama 0.27 to 0.32 (trained for
this: docs/benchmarks/rounding.json); keys with a few channels far larger than the others, as in
some models, reach 0.33 (docs/benchmarks/rotation.json)."""


def holds_every_key(ratio: float, layers: Sequence[LayerShape], beta: bool) -> bool:
    """Whether `ratio` is reached even with an entry for every key, stored as `layers` say."""
    stored = sum(x.stored_bytes([x.tokens] * x.heads, beta) for x in layers)
    return 0 < stored * ratio <= sum(x.full_bytes for x in layers)


def store_by_error(context: Context, held: Mapping[int, LayerReference]) -> str:
    """`int4`, or `int8` where 4 bits would change too much of what the `held` queries see.

    Without held-out queries there is no way to tell, and 8 bits are safe.
    """
    dims = [d for i in full_layers(context) for d in _dims(context, i)]
    if not dims:
        return NATIVE
    if not held or any(d % 2 for d in dims):
        return "int8"
    return "int4" if worst_rounding(context, held).error <= ROUNDING else "int8"


class Rounding(NamedTuple):
    """The layer whose outputs 4 bits change most, and the relative error there."""

    layer: int
    error: float


def worst_rounding(context: Context, held: Mapping[int, LayerReference]) -> Rounding:
    """What rounding to 4 bits does to the worst of the layers in `held` (at least one)."""
    int4 = quantizer_of("int4")
    assert int4 is not None
    errors = {i: float(rounding_error(context, i, held[i], int4)) for i in held}
    # NaN and infinity count as worse than any number.
    worst = max(errors, key=lambda i: (not math.isfinite(errors[i]), errors[i]))
    return Rounding(worst, errors[worst])


def rounding_error(
    context: Context, layer: int, held: LayerReference, quantizer: Quantizer
) -> torch.Tensor:
    """Relative output error from rounding a layer's keys and values: mean over heads, 0-d.

    Each head's error is that of `matching.fit_errors` over the `held` queries.
    """
    K, V = live_keys(context, layer)
    error = fit_errors(
        held.sample.queries(K, V), held.sample.logits,
        quantizer.round_keys(K, [K.shape[1]] * K.shape[0]), None, quantizer.round_values(V),
    )  # fmt: skip
    return context.loaded.shard.gathered(error.output).mean()


def _dims(context: Context, layer: int) -> tuple[int, int]:
    shape = context.loaded.geometry.layers[layer]
    return shape.key_dim, shape.value_dim
