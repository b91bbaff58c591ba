"""A manifest's stored lengths and fit errors, summed up in a few numbers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from amkv_format import EXTENSION, TOKEN_IDS, AmkvFile


def stored_range(
    layers: Sequence[Mapping[str, Any]], stored: Sequence[Sequence[int]]
) -> tuple[int, float, int]:
    """Fewest, mean and most entries of a KV head, over the layers that can be compacted.

    Over all layers if the model has only sliding windows.
    """
    pairs = list(zip(layers, stored, strict=True))
    counts = [n for layer, heads in pairs if layer["type"] == "full" for n in heads]
    counts = counts or [n for heads in stored for n in heads]
    return min(counts), round(statistics.fmean(counts), 2), max(counts)


def in_all(ratio: float, whole: float | None) -> str:
    """What to say after the ratio of the compacted layers, for people: ` (1.9× in all)`, with
    sliding windows and states, or nothing if that is no other number, or None: unknown."""
    same = whole is None or f"{whole:.1f}" == f"{ratio:.1f}"
    return "" if same else f" ({whole:.1f}× in all)"


def payload_bytes(file: AmkvFile) -> int:
    """Bytes of all keys, values, scales, biases, positions and states in a file."""
    return sum(
        x.nbytes
        for name, x in file.tensors.items()
        if name != TOKEN_IDS and not name.startswith(EXTENSION)
    )


def whole_ratio(file: AmkvFile) -> float:
    """Full over stored bytes of all layers, sliding windows and states included."""
    stored = payload_bytes(file)
    return file.full_bytes / stored if stored else 1.0


def stores_text(names: Sequence[str]) -> str:
    """How layers are stored, for people: a name, or several with their layers: `k4v4 (12 layers),
    int8 (3)`; those of most layers first."""
    counts = Counter(names).most_common()
    if len(counts) == 1:
        return names[0]
    said = [f"{name} ({count})" for name, count in counts]
    said[0] = f"{counts[0][0]} ({counts[0][1]} layers)"
    return ", ".join(said)


def fit_errors(manifest: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`name -> {mean, median, max}` over all heads whose relative error is known.

    In the mean a head counts by its attention to the document, if the manifest gives it: a head
    that looks elsewhere does little harm, however wrong it is.
    """
    found = {}
    for name, layers in manifest.get("fit_errors", {}).items():
        values = [value for heads in layers for value in heads]
        if not values:
            continue
        weights = _weights(manifest.get("attention"), layers)
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        found[name] = {
            "mean": float(f"{mean:.6g}"),
            "median": statistics.median(values),
            "max": max(values),
        }
    return found


def _weights(attention: Any, layers: Sequence[Sequence[float]]) -> list[float]:
    """`attention`, layer after layer, if it has the shape of `layers`; else 1 for each head."""
    equal = [1.0 for heads in layers for _ in heads]
    if not isinstance(attention, list) or len(attention) != len(layers):
        return equal
    flat = []
    for given, heads in zip(attention, layers, strict=True):
        if not heads:
            continue
        if not isinstance(given, list) or len(given) != len(heads):
            return equal
        flat += given
    plain = all(type(w) in (int, float) and 0 <= w <= 1 for w in flat)
    return flat if plain and sum(flat) > 0 else equal
