"""Compacts a context: reference pass, budgets, then one layer after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from amcli.artifacts import write_artifact
from amcli.errors import UsageError
from amcli.matching import budgets, methods
from amcli.matching.budgets import LayerShape, Lengths
from amcli.matching.compact import compact_layer
from amcli.matching.methods import Method, ScoreContext
from amcli.pipeline import reference
from amcli.pipeline.contexts import Context, dense, full_layers, live_keys
from amcli.pipeline.progress import Progress, Silent
from amcli.pipeline.reference import LayerReference
from amcli.ragged import RaggedHeads

DEFAULT_RATIO = 20.0


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    ratio, tokens  full bytes over stored bytes, or mean entries per KV head: at most one
    budget         `adaptive`, `uniform`, or None for the method's own
    queries        a key of `reference.SOURCES`
    """

    ratio: float | None = None
    tokens: int | None = None
    method: str = "omp"
    budget: str | None = None
    queries: str = "repeat"
    seed: int = 0
    max_queries: int = reference.MAX_QUERIES

    def requested(self, method: Method) -> dict[str, float | int]:
        """The size that was asked for, as the manifest records it."""
        if self.tokens is not None:
            return {"tokens": self.tokens}
        if self.ratio is None and method.selection == "all":
            return {"ratio": 1.0}
        return {"ratio": DEFAULT_RATIO if self.ratio is None else float(self.ratio)}


@dataclass
class Compaction:
    """A compacted context, ready to be written or to be used.

    layers   entries of every layer; sliding layers hold their raw tail
    errors   relative errors on the reference queries, `name -> layer -> head` (`[]`: unknown)
    seconds  time of each stage
    """

    context: Context
    options: Options
    method: Method
    budget: str
    layers: list[RaggedHeads]
    query_count: int
    errors: dict[str, list[list[float]]]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def full_bytes(self) -> int:
        """Bytes of the uncompacted keys and values of the compacted layers."""
        return sum(shape.full_bytes for shape in shapes(self.context))

    @property
    def stored_bytes(self) -> int:
        """Bytes stored for the compacted layers, biases included."""
        return sum(self.layers[i].nbytes for i in full_layers(self.context))

    @property
    def ratio(self) -> float:
        """Full over stored bytes of the compacted layers; 1 for a model that has none."""
        return self.full_bytes / self.stored_bytes if self.stored_bytes else 1.0

    def apply(self) -> None:
        """Puts the compact entries into the context's cache in place of the full ones."""
        for i in full_layers(self.context):
            self.context.cache.set_prefix(i, self.layers[i], self.context.T)

    def save(self, path: Path, overwrite: bool) -> dict[str, Any]:
        """Writes the artifact of kind `compact`; returns its manifest."""
        manifest = {
            **self.context.manifest(),
            "kind": "compact",
            "stored": [list(heads.lengths) for heads in self.layers],
            "method": {"name": self.method.name},
            "budget": {"name": self.budget},
            "requested": self.options.requested(self.method),
            "seed": self.options.seed,
            "queries": {
                "source": self.options.queries if self.method.queries else "none",
                "count": self.query_count,
            },
            "fit_errors": self.errors,
        }
        return write_artifact(path, manifest, self.context.ids, self.layers, overwrite=overwrite)


def shapes(context: Context) -> list[LayerShape]:
    """Shapes of the layers that can be compacted, in order."""
    layers = context.loaded.geometry.layers
    size = context.loaded.dtype.itemsize
    return [
        LayerShape(layers[i].kv_heads, context.T, layers[i].key_dim, layers[i].value_dim, size)
        for i in full_layers(context)
    ]


def check(options: Options, T: int | None = None) -> Method:
    """The method that `options` name; raises UsageError for what makes no sense, early."""
    method = methods.get(options.method)
    if options.ratio is not None and options.tokens is not None:
        raise UsageError("--ratio and --tokens exclude each other", "give one of them")
    if options.ratio is not None and not options.ratio >= 1:
        raise UsageError(f"--ratio {options.ratio:g} is below 1", "use a ratio such as 20")
    if options.tokens is not None and options.tokens < 1:
        raise UsageError(f"--tokens {options.tokens} is below 1", "use a number such as 256")
    if T is not None and options.ratio is not None and options.ratio > T:
        raise UsageError(
            f"--ratio {options.ratio:g} is more than the context has tokens ({T:,})",
            f"use a ratio between 1 and {T}",
        )
    if T is not None and options.tokens is not None and options.tokens > T:
        raise UsageError(
            f"--tokens {options.tokens:,} is more than the context has ({T:,})",
            f"use a number up to {T}",
        )
    if options.budget not in (None, "adaptive", "uniform"):
        raise UsageError(f"unknown budget {options.budget!r}", "budgets: adaptive, uniform")
    if options.queries not in reference.SOURCES:
        known = ", ".join(reference.SOURCES)
        raise UsageError(f"unknown reference queries {options.queries!r}", f"queries: {known}")
    if method.selection == "all" and (options.tokens or (options.ratio or 1) != 1):
        raise UsageError(
            f"method {method.name!r} keeps every key", "leave --ratio out, or use --ratio 1"
        )
    return method


def compact(context: Context, options: Options, *, progress: Progress | None = None) -> Compaction:
    """Compacts a context whose full cache is loaded; the context itself is left as it is.

    Raises UsageError for a ratio, budget or method that does not fit.
    """
    progress = progress or Silent()
    method = check(options, context.T)
    if not full_layers(context) and method.selection != "all":
        raise UsageError(
            f"{context.loaded.id} has only sliding-window layers: nothing to compact",
            "prefill the document and chat with that",
        )
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    references: dict[int, LayerReference] = {}
    if method.queries:
        passages = reference.SOURCES[options.queries](context)
        references = reference.collect(
            context,
            passages,
            max_queries=options.max_queries,
            seed=options.seed,
            kinds=(method.score_kind,),
            progress=progress,
        )
    seconds["reference"] = time.perf_counter() - began

    began = time.perf_counter()
    scores = [
        _scores(context, method, options, references.get(layer), layer, order)
        for order, layer in enumerate(full_layers(context))
    ]
    lengths, budget = _allocate(context, method, options, scores)
    layers, errors = _fit(context, method, options, references, scores, lengths, progress)
    seconds["compact"] = time.perf_counter() - began
    count = max((r.weights.shape[1] for r in references.values()), default=0)
    return Compaction(context, options, method, budget, layers, count, errors, seconds)


def _scores(
    context: Context,
    method: Method,
    options: Options,
    found: LayerReference | None,
    layer: int,
    order: int,
) -> torch.Tensor:
    """`[H, T]`: how much each key of a layer matters, by the method's own rule."""
    K, V = live_keys(context, layer)
    if method.score is not None:
        return method.score(
            ScoreContext(
                Q=None if found is None else found.Q,
                K=K,
                V=V,
                scale=_scale(found, K),
                softcap=None if found is None else found.softcap,
                weights=None if found is None else found.weights,
                layer=order,
                layers=len(full_layers(context)),
                seed=options.seed,
            )
        )
    if found is None:
        return K.new_zeros(K.shape[:2], dtype=torch.float32)
    return found.scores.scores(method.score_kind)


def _allocate(
    context: Context, method: Method, options: Options, scores: Sequence[torch.Tensor]
) -> tuple[Lengths, str]:
    """Entries per layer and head, and the name of the budget."""
    layers = shapes(context)
    name = options.budget or method.budget
    if method.selection == "all":
        return [[layer.tokens] * layer.heads for layer in layers], "all"

    def allocate(total: int) -> Lengths:
        if name == "uniform":
            return budgets.uniform(total, layers)
        return budgets.adaptive(scores, total)

    if options.tokens is not None:
        return allocate(options.tokens * sum(layer.heads for layer in layers)), name
    ratio = float(options.requested(method)["ratio"])
    total = budgets.entries_for_ratio(ratio, layers, beta=method.has_beta, allocate=allocate)
    return allocate(total), name


def _fit(
    context: Context,
    method: Method,
    options: Options,
    references: Mapping[int, LayerReference],
    scores: Sequence[torch.Tensor],
    lengths: Lengths,
    progress: Progress,
) -> tuple[list[RaggedHeads], dict[str, list[list[float]]]]:
    """Every layer's entries, and the fit errors of those that were compacted."""
    count = len(context.loaded.geometry.layers)
    layers: list[RaggedHeads] = []
    errors: dict[str, list[list[float]]] = {"mass": [], "output": []}
    order = {layer: i for i, layer in enumerate(full_layers(context))}
    progress.start("compact", count)
    for layer in range(count):
        found = references.get(layer)
        if layer not in order:
            layers.append(dense(context.cache, layer))
            mass = output = None
        else:
            K, V = live_keys(context, layer)
            i = order[layer]
            result = compact_layer(
                method,
                K[:, :0] if found is None else found.Q,
                K,
                V,
                scores=scores[i],
                lengths=lengths[i],
                scale=_scale(found, K),
                softcap=None if found is None else found.softcap,
                weights=None if found is None else found.weights,
                seed=options.seed,
            )
            layers.append(result.heads)
            mass, output = result.mass_error, result.output_error
        errors["mass"].append(_finite(mass))
        errors["output"].append(_finite(output))
        progress.advance()
    return layers, errors


def _scale(found: LayerReference | None, K: torch.Tensor) -> float:
    return float(K.shape[-1] ** -0.5) if found is None else found.scale


def _finite(values: torch.Tensor | None) -> list[float]:
    """Six digits of each head's error; nothing where it is unknown."""
    if values is None or not bool(values.isfinite().all()):
        return []
    return [float(f"{v:.6g}") for v in values.tolist()]
