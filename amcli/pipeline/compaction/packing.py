"""Putting entries into the store that a plan has for their layer, and saying where that fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from amcli.entries.catalogue import NATIVE
from amcli.entries.matrix import UnstorableError
from amcli.entries.ragged import Entries
from amcli.entries.stores import quantizer_of
from amcli.errors import UsageError
from amcli.pipeline.compaction.plan import Plan
from amcli.pipeline.contexts.context import Context, dense


def packed(plan: Plan, layer: int, entries: Entries) -> Entries:
    """Entries of a layer as the plan stores them."""
    quantizer = quantizer_of(plan.stores.get(layer, NATIVE))
    return entries if quantizer is None else quantizer.pack(entries)


def whole_layer(context: Context, plan: Plan, layer: int) -> Entries:
    """What a sliding layer holds, as the plan stores it. Raises UsageError as `fit`."""
    with storable([layer]), in_layer(0):
        return packed(plan, layer, dense(context.cache, layer))


@contextmanager
def in_layer(place: int) -> Iterator[None]:
    """Says which of the layers has a number that cannot be stored."""
    try:
        yield
    except UnstorableError as error:
        error.layer = place
        raise


@contextmanager
def storable(layers: Sequence[int]) -> Iterator[None]:
    """Raises UsageError for a number that cannot be stored, with the layer it is in."""
    try:
        yield
    except UnstorableError as error:
        layer = layers[error.layer or 0]
        raise UsageError(
            f"layer {layer}: {error}",
            "use store native",
            code="not-storable",
            field="store",
            layer=layer,
        ) from error
