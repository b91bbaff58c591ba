"""Few numbers that stand for many: stored lengths and fit errors of a manifest."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def stored_range(
    layers: Sequence[Mapping[str, Any]], stored: Sequence[Sequence[int]]
) -> tuple[int, float, int]:
    """Fewest, mean and most entries of a KV head, over the layers that can be compacted.

    Over all layers where the model has only sliding windows.
    """
    pairs = list(zip(layers, stored, strict=True))
    counts = [n for layer, heads in pairs if layer["type"] == "full" for n in heads]
    counts = counts or [n for heads in stored for n in heads]
    return min(counts), round(statistics.fmean(counts), 2), max(counts)


def fit_errors(errors: Mapping[str, Iterable[Sequence[float]]]) -> dict[str, dict[str, float]]:
    """`name -> {median, max}` over all heads whose relative error is known."""
    found = {}
    for name, layers in errors.items():
        values = [value for heads in layers for value in heads]
        if values:
            found[name] = {"median": statistics.median(values), "max": max(values)}
    return found
