"""Compacts a context: reference pass, budgets, then one layer after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from amcli.artifacts import write_artifact
from amcli.errors import UsageError
from amcli.matching import budgets, methods
from amcli.matching.budgets import LayerShape, Lengths
from amcli.matching.compact import LayerResult, compact_layer
from amcli.matching.methods import FUTURE, Method, ScoreContext
from amcli.matching.scores import SCORE_KINDS, ScoreKind
from amcli.models.rotary import Rotary
from amcli.pipeline import budget_file, heldout, reference
from amcli.pipeline.budget_file import BudgetFile
from amcli.pipeline.contexts import Context, dense, full_layers, live_keys
from amcli.pipeline.progress import Progress, Silent
from amcli.pipeline.reference import LayerReference, Passes
from amcli.quantize import NATIVE, STORES, Entries, quantizer_of

if TYPE_CHECKING:
    from amcli.pipeline.fidelity import Reached

DEFAULT_RATIO = 20.0

AUTO = "auto"
"""Queries by need: `repeat`, and `self-study` too where few keys are kept."""

SCARCE = 24.0
"""Keys for one entry from which on `auto` adds self-study: where not all that a document says can
be kept, it matters what will be asked; below, it costs time and changes little."""

FILE = "file"
"""What a budget that was read from a file is called."""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    ratio, tokens  full bytes over stored bytes, or mean entries per KV head: at most one
    budget         one of `budgets.NAMES`, the path of a budget file, or None for the method's own
    queries        names of `reference.SOURCES`, joined by `+`; `auto`; None for the method's own
    window         most recent tokens that snapkv and pyramidkv look from and keep; None: 64, or
                   fewer where that would be more than a quarter of a head's entries
    store          how entries are stored, one of `quantize.STORES`
    """

    ratio: float | None = None
    tokens: int | None = None
    method: str = "omp"
    budget: str | None = None
    queries: str | None = None
    seed: int = 0
    max_queries: int = reference.MAX_QUERIES
    window: int | None = None
    store: str = NATIVE

    def source(self, method: Method) -> str:
        """Where a method's queries come from: `none`, `auto`, or names of `reference.SOURCES`."""
        return (self.queries or method.source) if method.queries else "none"

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

    layers       entries of every layer; sliding layers hold their raw tail
    query_count  reference queries per KV head, `held_out` of which no fit has seen
    errors       relative errors on the held-out queries, `name -> layer -> head` (`[]`: unknown)
    attention    mean share of the attention of those queries that is on the document, `layer ->
                 head` (`[]`: unknown)
    seconds      time of each stage
    fidelity     what a search for the ratio has found, if there was one
    file         the file that gave the budget, if it was one
    """

    context: Context
    options: Options
    method: Method
    budget: str
    layers: list[Entries]
    query_count: int
    held_out: int
    errors: dict[str, list[list[float]]]
    attention: list[list[float]]
    seconds: dict[str, float] = field(default_factory=dict)
    fidelity: Reached | None = None
    file: BudgetFile | None = None

    @property
    def full_bytes(self) -> int:
        """Bytes of the uncompacted keys and values of the compacted layers."""
        return sum(shape.full_bytes for shape in shapes(self.context))

    @property
    def stored_bytes(self) -> int:
        """Bytes stored for the compacted layers, scales and biases included."""
        return sum(self.layers[i].nbytes for i in full_layers(self.context))

    @property
    def ratio(self) -> float:
        """Full over stored bytes of the compacted layers; 1 for a model that has none."""
        return self.full_bytes / self.stored_bytes if self.stored_bytes else 1.0

    def apply(self) -> None:
        """Puts the compact entries into the context's cache in place of the full ones."""
        for i in full_layers(self.context):
            self.context.cache.set_prefix(i, self.layers[i], self.context.T)

    @property
    def requested(self) -> dict[str, float | int]:
        """What was asked for; with a fidelity, the ratio is the one that was found."""
        requested = self.options.requested(self.method)
        if self.fidelity is not None:
            requested["fidelity"] = self.fidelity.asked
        return requested

    def save(self, path: Path, overwrite: bool) -> dict[str, Any]:
        """Writes the artifact of kind `compact`; returns its manifest."""
        budget: dict[str, Any] = {"name": self.budget}
        if self.file is not None:
            budget |= {"file": self.file.path.name, "sha256": self.file.sha256}
        manifest = {
            **self.context.manifest(),
            "kind": "compact",
            "stored": [list(heads.lengths) for heads in self.layers],
            "store": self.options.store,
            "method": {"name": self.method.name},
            "budget": budget,
            "requested": self.requested,
            "seed": self.options.seed,
            "queries": {
                "source": self.options.source(self.method),
                "count": self.query_count,
                "held_out": self.held_out,
            },
            "fit_errors": self.errors,
        }
        if self.fidelity is not None:
            manifest["fidelity"] = self.fidelity.record()
        return write_artifact(path, manifest, self.context.ids, self.layers, overwrite=overwrite)

    def save_budget(self, path: Path, overwrite: bool) -> None:
        """Writes how the entries were shared out as a budget file; see `budget_file.write`."""
        model = self.context.loaded.fingerprint()["model"]
        about = {
            "model": {k: model[k] for k in ("id", "revision", "architecture", "config_hash")},
            "method": self.method.name,
            "budget": self.budget,
            "queries": self.options.source(self.method),
            "seed": self.options.seed,
            "ratio": round(self.ratio, 4),
            "tokens": self.context.T,
            "source": self.context.source,
        }
        lengths = {i: list(self.layers[i].lengths) for i in full_layers(self.context)}
        budget_file.write(path, lengths, about, overwrite=overwrite)


def shapes(context: Context, store: str = NATIVE) -> list[LayerShape]:
    """Shapes of the layers that can be compacted, in order, with entries stored as `store`."""
    quantizer, size = quantizer_of(store), context.loaded.dtype.itemsize
    found = []
    for layer in (context.loaded.geometry.layers[i] for i in full_layers(context)):
        dims = layer.key_dim, layer.value_dim
        packed = None if quantizer is None else quantizer.entry_bytes(*dims)
        found.append(LayerShape(layer.kv_heads, context.T, *dims, size, packed))
    return found


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
    _budget_file(options)
    if options.store not in STORES:
        raise UsageError(f"unknown store {options.store!r}", f"stores: {', '.join(STORES)}")
    _check_queries(options, method)
    if method.selection == "all" and (options.tokens or (options.ratio or 1) != 1):
        raise UsageError(
            f"method {method.name!r} keeps every key", "leave --ratio out, or use --ratio 1"
        )
    return method


def _budget_file(options: Options) -> BudgetFile | None:
    """The file that gives the budget, if it is one: a name wins over a file of that name.

    Raises UsageError for what is neither, and for a file that is no budget.
    """
    if options.budget is None or options.budget in budgets.NAMES:
        return None
    path = Path(options.budget)
    if not path.exists():
        known = ", ".join(budgets.NAMES)
        raise UsageError(
            f"unknown budget {options.budget!r}: no such name, and no such file",
            f"budgets: {known}, or a file that --save-budget wrote",
        )
    return BudgetFile.read(path)


def _check_queries(options: Options, method: Method) -> None:
    """Raises UsageError for queries or a window that the method cannot use."""
    if options.queries not in (None, AUTO):
        reference.sources(str(options.queries))
    if method.watch is not None and options.queries not in (None, method.source):
        raise UsageError(
            f"method {method.name!r} is defined by its own queries ({method.source}), "
            f"not by {options.queries!r}",
            "leave --queries out",
        )
    if options.window is not None and options.window < 1:
        raise UsageError(f"a window of {options.window} tokens is below 1", "use 64, for example")


def compact(
    context: Context,
    options: Options,
    *,
    progress: Progress | None = None,
    passes: Passes | None = None,
) -> Compaction:
    """Compacts a context whose full cache is loaded; the context itself is left as it is.

    `passes` keeps the reference passes of this context for later calls; the seconds reported
    for one are those it took when it ran. Raises UsageError for a ratio, budget or method that
    does not fit, and for a method that needs a RoPE which the model does not let it find.
    """
    progress = progress or Silent()
    method = check(options, context.T)
    if not full_layers(context) and method.selection != "all":
        raise UsageError(
            f"{context.loaded.id} has only sliding-window layers: nothing to compact",
            "prefill the document and chat with that",
        )
    file = None if method.selection == "all" else _budget_file(options)
    if file is not None:
        file.require_fit(context.loaded.id, full_layers(context), shapes(context))
    quantizer = quantizer_of(options.store)
    odd = [d for x in shapes(context) for d in (x.key_dim, x.value_dim) if d % 2]
    if quantizer is not None and quantizer.bits == 4 and odd:
        raise UsageError(
            f"--store {options.store} wants even head dimensions, {context.loaded.id} has {odd[0]}",
            "use --store int8",
        )
    if passes is None:
        passes = Passes(context, shared=False)
    elif passes.context is not context:
        raise ValueError("the reference passes are those of another context")
    rotary = None
    if method.rope or method.rerotate:
        rotary = Rotary(context.loaded.model, context.loaded.geometry)
    planned = _planned(context, method, options, file)
    if options.source(method) == AUTO:
        options = replace(options, queries=_by_need(context, planned))
    references, reference_seconds = _references(context, method, options, rotary, passes, progress)

    began = time.perf_counter()
    scores = [
        _scores(context, method, options, references.get(layer), layer, planned[order], rotary)
        for order, layer in enumerate(full_layers(context))
    ]
    lengths, budget = _allocate(context, method, options, scores, file)
    fitted = _fit(context, method, options, references, scores, lengths, rotary, progress)
    seconds = {"reference": reference_seconds, "compact": time.perf_counter() - began}
    return Compaction(
        context,
        options,
        method,
        budget,
        [layer.heads for layer in fitted],
        max((r.count for r in references.values()), default=0),
        max(layer.held_out for layer in fitted),
        {"mass": [layer.mass for layer in fitted], "output": [layer.output for layer in fitted]},
        [layer.attention for layer in fitted],
        seconds,
        file=file,
    )


def _references(
    context: Context,
    method: Method,
    options: Options,
    rotary: Rotary | None,
    passes: Passes,
    progress: Progress,
) -> tuple[dict[int, LayerReference], float]:
    """The queries a method asks for, `layer -> reference`, and the seconds it took."""
    source = options.source(method)
    if source == "none":
        return {}, 0.0
    kinds: tuple[ScoreKind, ...] = () if method.score is not None else (method.score_kind,)
    if passes.shared and method.watch is None:
        kinds = SCORE_KINDS  # each costs little beside a pass of its own
    last = method.window if options.window is None else max(options.window, method.window or 0)

    def run() -> dict[int, LayerReference]:
        if source == "context" and method.window is not None:
            passages = reference.context_passages(context, last)
        else:
            passages = reference.passages(context, source, options.seed, progress)
        return reference.collect(
            context,
            passages,
            max_queries=heldout.to_sample(options.max_queries),
            seed=options.seed,
            kinds=kinds,
            watch=method.watch,
            rotary=rotary if method.rope else None,
            progress=progress,
        )

    watched = method.watch is not None
    sample = None if watched else (options.seed, options.max_queries)
    return passes.get((source, method.watch, last if watched else None, kinds, sample), run)


def _by_need(context: Context, planned: Sequence[int]) -> str:
    """The sources that `auto` stands for, with `planned` entries a head in each layer."""
    layers = shapes(context)
    entries = sum(t * layer.heads for t, layer in zip(planned, layers, strict=True))
    keys = sum(layer.tokens * layer.heads for layer in layers)
    if context.loaded.chat.raw or keys < SCARCE * entries:
        return "repeat"
    return "repeat+self-study"


def _budget(method: Method, options: Options) -> str:
    return "all" if method.selection == "all" else options.budget or method.budget


def _planned(
    context: Context, method: Method, options: Options, file: BudgetFile | None
) -> list[int]:
    """Entries per head of each layer, before scores are known; see `budgets.planned`."""
    layers = shapes(context, options.store)
    if method.selection == "all":
        return [layer.tokens for layer in layers]
    if options.tokens is not None:
        total = options.tokens * sum(layer.heads for layer in layers)
    else:
        ratio = float(options.requested(method)["ratio"])
        total = budgets.entries_for_ratio(ratio, layers, beta=method.has_beta)
    if file is not None:
        given = file.allocate(total, layers)
        return [sum(heads) // max(1, len(heads)) for heads in given]
    return budgets.planned(_budget(method, options), total, layers)


def _scores(
    context: Context,
    method: Method,
    options: Options,
    found: LayerReference | None,
    layer: int,
    entries: int,
    rotary: Rotary | None,
) -> torch.Tensor:
    """`[H, T]`: how much each key of a layer matters, by the method's own rule."""
    K, V = live_keys(context, layer)
    if method.score is not None:
        sampled = found is not None and found.watched is None
        rotation = None
        if method.rope and rotary is not None:
            future = torch.arange(context.T, context.T + FUTURE)
            rotation = rotary.mean(layer, future, K.shape[-1])
        return method.score(
            ScoreContext(
                Q=found.Q if found is not None and sampled else None,
                K=K,
                V=V,
                scale=_scale(found, K),
                softcap=None if found is None else found.softcap,
                weights=found.weights if found is not None and sampled else None,
                layer=full_layers(context).index(layer),
                layers=len(full_layers(context)),
                seed=options.seed,
                watched=None if found is None else found.watched,
                entries=entries,
                budget=_budget(method, options),
                window=options.window,
                rotation=rotation,
            )
        )
    if found is None:
        return K.new_zeros(K.shape[:2], dtype=torch.float32)
    return found.scores.scores(method.score_kind)


def _allocate(
    context: Context,
    method: Method,
    options: Options,
    scores: Sequence[torch.Tensor],
    file: BudgetFile | None,
) -> tuple[Lengths, str]:
    """Entries per layer and head, and the name of the budget."""
    layers = shapes(context, options.store)
    name = FILE if file is not None else _budget(method, options)
    if method.selection == "all":
        return [[layer.tokens] * layer.heads for layer in layers], name

    def allocate(total: int) -> Lengths:
        if file is not None:
            return file.allocate(total, layers)
        return budgets.allocate(name, total, layers, scores)

    if options.tokens is not None:
        return allocate(options.tokens * sum(layer.heads for layer in layers)), name
    ratio = float(options.requested(method)["ratio"])
    total = budgets.entries_for_ratio(ratio, layers, beta=method.has_beta, allocate=allocate)
    return allocate(total), name


@dataclass(frozen=True)
class _Fitted:
    """One layer as stored, and per head what is known of it (`[]`: nothing); see `Compaction`."""

    heads: Entries
    held_out: int = 0
    mass: list[float] = field(default_factory=list)
    output: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)


def _fit(
    context: Context,
    method: Method,
    options: Options,
    references: Mapping[int, LayerReference],
    scores: Sequence[torch.Tensor],
    lengths: Lengths,
    rotary: Rotary | None,
    progress: Progress,
) -> list[_Fitted]:
    """Every layer's entries; sliding layers as they are."""
    count = len(context.loaded.geometry.layers)
    order = {layer: i for i, layer in enumerate(full_layers(context))}
    fitted = []
    progress.start("compact", count)
    for layer in range(count):
        if layer in order:
            i = order[layer]
            found = references.get(layer)
            fitted.append(
                _fit_layer(context, method, options, found, layer, scores[i], lengths[i], rotary)
            )
        else:
            fitted.append(_Fitted(dense(context.cache, layer)))
        progress.advance()
    return fitted


def _fit_layer(
    context: Context,
    method: Method,
    options: Options,
    found: LayerReference | None,
    layer: int,
    scores: torch.Tensor,
    lengths: list[int],
    rotary: Rotary | None,
) -> _Fitted:
    """One compacted layer, by the method's own fit or by `compact_layer`, and its errors."""
    K, V = live_keys(context, layer)
    fit = held = None
    if found is not None and found.watched is None:
        geometry = context.loaded.geometry
        group = geometry.query_heads[layer] // geometry.layers[layer].kv_heads
        fit, held = heldout.split(found, group, options.seed)
    Q = K[:, :0] if fit is None else fit.Q
    weights = None if fit is None else fit.weights
    scale, softcap = _scale(found, K), None if found is None else found.softcap
    quantizer = quantizer_of(options.store)
    # Keys that are turned after the fit are rounded after that, once.
    rounding = None if method.rerotate else quantizer
    if method.fit is not None:
        result = method.fit(
            Q, K, V, scores=scores, lengths=lengths, scale=scale, softcap=softcap,
            weights=weights, rounding=rounding,
        )  # fmt: skip
    else:
        result = compact_layer(
            method, Q, K, V, scores=scores, lengths=lengths, scale=scale, softcap=softcap,
            weights=weights, seed=options.seed, rounding=rounding,
        )  # fmt: skip
    if method.rerotate and rotary is not None:
        result = _rerotate(result, rotary, layer, context.T)
    heads: Entries = result.heads if quantizer is None else quantizer.pack(result.heads)
    if held is None:  # known only where everything or nothing was kept
        return _Fitted(heads, 0, _finite(result.mass_error), _finite(result.output_error))
    mass, output = heldout.errors(held, K, V, heads.unpack(), scale=scale, softcap=softcap)
    return _Fitted(
        heads,
        held.Q.shape[1],
        _finite(mass),
        _finite(output),
        _finite(held.weights.float().mean(1)),
    )


def _rerotate(result: LayerResult, rotary: Rotary, layer: int, T: int) -> LayerResult:
    """The same entries with each head's keys turned to the last positions before `T`."""
    lengths = result.heads.lengths
    positions = torch.cat([torch.arange(T - t, T) for t in lengths])
    keys = result.heads.keys
    plain = rotary.unrotate(layer, keys, result.index.long())
    turned = rotary.rotate(layer, plain, positions).to(keys.dtype)
    # A key that stays where it was stays exactly what it was.
    moved = (positions.to(keys.device) != result.index).unsqueeze(1)
    return replace(result, heads=replace(result.heads, keys=torch.where(moved, turned, keys)))


def _scale(found: LayerReference | None, K: torch.Tensor) -> float:
    return float(K.shape[-1] ** -0.5) if found is None else found.scale


def _finite(values: torch.Tensor) -> list[float]:
    """Six digits of each head's number; nothing where it is unknown."""
    if not bool(values.isfinite().all()):
        return []
    return [float(f"{v:.6g}") for v in values.tolist()]
