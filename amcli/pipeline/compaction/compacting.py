"""Compacts a context: reference pass, budgets, then the fits of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from amcli.entries.quantize import NATIVE, Entries, quantizer_of
from amcli.errors import UsageError
from amcli.matching import budgets
from amcli.matching.budgets import LayerShape, Lengths
from amcli.matching.methods import FUTURE, Method, ScoreContext
from amcli.models.rotary import Rotary
from amcli.pipeline.compaction import budget_file, early, heldout
from amcli.pipeline.compaction.budget_file import BudgetFile
from amcli.pipeline.compaction.choices import (
    Rounding,
    holds_every_key,
    store_by_error,
    worst_rounding,
)
from amcli.pipeline.compaction.fitting import fit, sample_of
from amcli.pipeline.compaction.heldout import Errors
from amcli.pipeline.compaction.options import AUTO, budget_of
from amcli.pipeline.compaction.options import Options as Options
from amcli.pipeline.compaction.options import check as check
from amcli.pipeline.contexts.context import Context, full_layers, live_keys, require_finite
from amcli.pipeline.contexts.source import bare_name
from amcli.pipeline.queries.passes import Passes, references
from amcli.pipeline.queries.reference import LayerReference
from amcli.pipeline.queries.self_study import TEMPERATURE
from amcli.storage.artifacts import NewArtifact, complete
from amcli.system.clock import stopwatch
from amcli.system.progress import Progress, Silent

if TYPE_CHECKING:
    from amcli.pipeline.compaction.fidelity import Reached

POSITION_BYTES = 4
"""What the position of an entry costs, where it is stored."""

FILE = "file"
"""What a budget that was read from a file is called."""


@dataclass
class Compaction:
    """A compacted context, ready to be written or to be used.

    layers       entries of every layer; sliding layers hold their raw tail
    query_count  reference queries per KV head that the fits may use
    asked        questions that the model asked itself for them
    seconds      time of each stage
    errors       of the stored entries, on held-out queries; None: not measured
    rounding     what 4 bits do to the worst layer, where the user asked for them
    fidelity     what a search for the ratio has found, if there was one
    file         the file that gave the budget, if it was one
    positions    per layer that was compacted the token each entry was taken from, `[N]` int32, to
                 be stored; empty: not asked for
    """

    context: Context
    options: Options
    method: Method
    budget: str
    layers: list[Entries]
    query_count: int
    asked: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    errors: Errors | None = None
    rounding: Rounding | None = None
    fidelity: Reached | None = None
    file: BudgetFile | None = None
    positions: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def full_bytes(self) -> int:
        """Bytes of the uncompacted keys and values of the compacted layers."""
        return sum(shape.full_bytes for shape in shapes(self.context))

    @property
    def stored_bytes(self) -> int:
        """Bytes stored for the compacted layers, scales, biases and positions included."""
        places = sum(x.nbytes for x in self.positions.values())
        return places + sum(self.layers[i].nbytes for i in full_layers(self.context))

    @property
    def ratio(self) -> float:
        """Full over stored bytes of the compacted layers; 1 for a model that has none."""
        return self.full_bytes / self.stored_bytes if self.stored_bytes else 1.0

    def apply(self) -> None:
        """Puts the compact entries into the context's cache in place of the full ones."""
        for i in full_layers(self.context):
            mine = self.context.loaded.shard.mine(self.layers[i])
            self.context.cache.set_prefix(i, mine, self.context.T)

    @property
    def requested(self) -> dict[str, float | int]:
        """What was asked for; with a fidelity, the ratio is the one that was found."""
        requested = self.options.requested(self.method)
        if self.fidelity is not None:
            requested["fidelity"] = self.fidelity.asked
        return requested

    def save(self, path: Path, overwrite: bool) -> dict[str, Any]:
        """Writes the artifact of kind `compact`; returns its manifest."""
        with NewArtifact(path, overwrite) as new:
            return self.finish(new)

    def finish(self, new: NewArtifact) -> dict[str, Any]:
        """The same, where some of it may be written already; see `compact`."""
        budget: dict[str, Any] = {"name": self.budget}
        if self.file is not None:
            budget |= {"file": bare_name(self.file.path), "sha256": self.file.sha256}
        manifest = {
            **self.context.manifest(),
            "kind": "compact",
            "stored": [list(heads.lengths) for heads in self.layers],
            "store": self.options.storage(self.method),
            "method": {"name": self.method.name},
            "budget": budget,
            "requested": self.requested,
            "seed": self.options.seed,
            "queries": {"source": self.options.source(self.method), "count": self.query_count},
        }
        if self.asked:
            manifest["queries"] |= {"asked": self.asked, "temperature": TEMPERATURE}
        if self.errors is not None:
            manifest |= self.errors.record()
            manifest["queries"]["held_out"] = self.errors.count
        if self.fidelity is not None:
            manifest["fidelity"] = self.fidelity.record()
        ids, states = self.context.ids, self.context.cache.get_states()
        return self.context.loaded.shard.once(
            lambda: complete(new, manifest, ids, self.layers, states, self.positions)
        )

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
        self.context.loaded.shard.once(
            lambda: budget_file.write(path, lengths, about, overwrite=overwrite)
        )


def shapes(context: Context, store: str = NATIVE, positions: bool = False) -> list[LayerShape]:
    """Shapes of the layers that can be compacted, in order, with entries stored as `store`, and
    with their `positions` or without."""
    quantizer, size = quantizer_of(store), context.loaded.dtype.itemsize
    found = []
    for layer in (context.loaded.geometry.layers[i] for i in full_layers(context)):
        dims = layer.key_dim, layer.value_dim
        packed = None if quantizer is None else quantizer.entry_bytes(*dims)
        if positions:
            packed = (sum(dims) * size if packed is None else packed) + POSITION_BYTES
        heads = layer.kv_heads * context.loaded.shard.size
        found.append(LayerShape(heads, context.T, *dims, size, packed))
    return found


def compact(
    context: Context,
    options: Options,
    *,
    progress: Progress | None = None,
    passes: Passes | None = None,
    errors: bool = True,
    into: NewArtifact | None = None,
) -> Compaction:
    """Compacts a context whose full cache is loaded; the context itself is left as it is.

    `passes` keeps the reference passes of this context for later calls; the seconds reported
    for one are those it took when it ran. `errors`: measure them, which reads some hundred
    tokens more and changes nothing else; see `measure`. `into`: an artifact that takes each layer
    as soon as it is fitted, to be written while others are; `Compaction.finish` ends it.

    Raises UsageError for a ratio, budget or method that does not fit, and for a method that
    needs a RoPE which the model does not let it find.
    """
    progress = progress or Silent()
    method = check(options, context.T)
    if not full_layers(context) and method.selection != "all":
        raise UsageError(
            f"{context.loaded.id} has only sliding-window layers: nothing to compact",
            "prefill the document and chat with that",
        )
    require_finite(context)
    file = None if method.selection == "all" else budget_of(options)
    if file is not None:
        file.require_fit(context.loaded.id, full_layers(context), shapes(context))
    if passes is None:
        passes = Passes(context, shared=False)
    elif passes.context is not context:
        raise ValueError("the reference passes are those of another context")
    rotary = None
    if method.rope or method.rerotate:
        rotary = Rotary(context.loaded.model, context.loaded.geometry)
    asked_for = options.store
    began = stopwatch(context.loaded.device)
    options = settled(context, method, options, passes, progress)
    settling = stopwatch(context.loaded.device) - began
    planned = _planned(context, method, options, file)
    asking, seconds = references(context, method, options, rotary, passes, progress)

    began = stopwatch(context.loaded.device)
    scores = [
        _scores(context, method, options, asking.get(layer), layer, planned[order], rotary)
        for order, layer in enumerate(full_layers(context))
    ]
    shard = context.loaded.shard
    everyone = [shard.gathered(part) for part in scores]
    lengths, budget = _allocate(context, method, options, everyone, file)
    written = None
    if into is not None and shard.size == 1:
        written = early.begin(into, context, method, options, lengths)
    layers, positions = fit(
        context, method, options, asking, scores, lengths, rotary, progress, written
    )
    seconds["compact"] = stopwatch(context.loaded.device) - began
    count = max((r.count for r in asking.values()), default=0)
    asked = max((r.asked for r in asking.values()), default=0)
    found = Compaction(
        context, options, method, budget, layers, count, asked, seconds, file=file,
        positions=positions,
    )  # fmt: skip
    if errors:
        measure(found, passes, progress, rounding=asked_for == "int4")
        seconds["errors"] += settling  # which asks the same queries, if it asks any
    return found


def settled(
    context: Context, method: Method, options: Options, passes: Passes, progress: Progress
) -> Options:
    """The same options with the `store` decided. Raises UsageError for one that cannot be."""
    store, ratio = options.storage(method), options.ratio
    int8 = shapes(context, "int8", options.positions)
    if store == AUTO and ratio is not None and holds_every_key(ratio, int8, method.has_beta):
        store = "int8"  # nothing has to go: fewer bits would only cost precision
    elif store == AUTO:
        held = _held_out(context, options.seed, passes, progress)
        store, _ = passes.get(("store", options.seed), lambda: store_by_error(context, held))
    quantizer = quantizer_of(store)
    odd = [d for x in shapes(context) for d in (x.key_dim, x.value_dim) if d % 2]
    if quantizer is not None and quantizer.bits == 4 and odd:
        raise UsageError(
            f"--store {store} wants even head dimensions, {context.loaded.id} has {odd[0]}",
            "use --store int8",
        )
    return replace(options, store=store)


def _held_out(
    context: Context, seed: int, passes: Passes, progress: Progress
) -> dict[int, LayerReference]:
    """Queries that no fit sees, made once for a context."""
    held, _ = passes.get(("held-out", seed), lambda: heldout.queries(context, seed, progress))
    return held


def measure(found: Compaction, passes: Passes, progress: Progress, rounding: bool = False) -> None:
    """Fills in the errors of a compaction on held-out queries, and the seconds that it took; with
    `rounding` also what 4 bits do."""
    context, seed = found.context, found.options.seed
    began = stopwatch(context.loaded.device)
    held = _held_out(context, seed, passes, progress)
    found.errors = heldout.measure(context, found.layers, held)
    if rounding and held:
        found.rounding = worst_rounding(context, held)
    found.seconds["errors"] = stopwatch(context.loaded.device) - began


def _budget(method: Method, options: Options) -> str:
    return "all" if method.selection == "all" else options.budget or method.budget


def _planned(
    context: Context, method: Method, options: Options, file: BudgetFile | None
) -> list[int]:
    """Entries per head of each layer, before scores are known; see `budgets.planned`."""
    layers = shapes(context, options.storage(method), options.positions)
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
        rotation = None
        if method.rope and rotary is not None:
            future = torch.arange(context.T, context.T + FUTURE)
            rotation = rotary.mean(layer, future, K.shape[-1]).to(K.device)
        return method.score(
            ScoreContext(
                sample=sample_of(found, K),
                K=K,
                V=V,
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
    return found.ranked(method.score_kind)


def _allocate(
    context: Context,
    method: Method,
    options: Options,
    scores: Sequence[torch.Tensor],
    file: BudgetFile | None,
) -> tuple[Lengths, str]:
    """Entries per layer and head, and the name of the budget."""
    layers = shapes(context, options.storage(method), options.positions)
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
