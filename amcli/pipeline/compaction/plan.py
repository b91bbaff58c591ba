"""The plan of a compaction: everything decided before anything is fitted, in one place.

`decide` turns what was asked for (`Request`) into a `Plan`, which everything after it uses and
nothing changes. A plan needs no tensor, only the shapes of a model's layers (`Target`), so it can
be made and looked at before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from amcli.entries.catalogue import MIXED, NATIVE
from amcli.entries.stores import quantizer_of
from amcli.errors import UsageError
from amcli.matching import budgets
from amcli.matching.budgets import LayerShape, Lengths
from amcli.matching.methods import Method
from amcli.models.geometry import LayerGeometry
from amcli.models.memory import Preview
from amcli.models.template import ChatTemplate
from amcli.pipeline.compaction.budget_file import BudgetFile
from amcli.pipeline.compaction.choices import Changes, chosen, fits, holds_every_key
from amcli.pipeline.compaction.defaults import AUTO, FINE
from amcli.pipeline.compaction.request import Request, check
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.queries.passes import QueryPlan
from amcli.storage.artifacts import Artifact

POSITION_BYTES = 4
"""Bytes of an entry's position, where positions are stored."""

FILE = "file"
"""The name of a budget that was read from a file."""


@dataclass(frozen=True)
class Target:
    """What is to be compacted: the shape of a context.

    model     the model's id
    T         tokens of the context
    layers    the layers that can be compacted, by index, with the heads of all processes
    itemsize  bytes per number in the full cache
    sliding   the other layers with keys and values, of which only a tail is kept
    states    bytes of the states of layers without; None: unknown
    """

    model: str
    T: int
    layers: Mapping[int, LayerGeometry]
    itemsize: int
    sliding: Mapping[int, LayerGeometry] = field(default_factory=dict)
    states: int | None = 0

    @classmethod
    def of(cls, context: Context) -> Target:
        """The target for a context in a cache."""
        loaded = context.loaded
        layers = [layer.times(loaded.shard.size) for layer in loaded.geometry.layers]
        states = sum(x.nbytes for x in context.cache.get_states().values())
        return cls.split(loaded.id, context.T, layers, loaded.dtype.itemsize, states)

    @classmethod
    def of_artifact(cls, artifact: Artifact, dtype: torch.dtype | None = None) -> Target:
        """The target for a prefill on disk, once loaded in `dtype` (None: its own)."""
        model = artifact.manifest["model"]
        layers = [
            LayerGeometry(
                "sliding" if x.window else "full", x.kv_heads, x.key_dim, x.value_dim, x.window
            )
            for x in artifact.layers
        ]
        itemsize = (dtype or getattr(torch, model["dtype"])).itemsize
        T, states = artifact.logical_length, artifact.state_bytes
        return cls.split(model["id"], T, layers, itemsize, states)

    @classmethod
    def of_text(cls, preview: Preview, text: str) -> Target:
        """The target for a document not read yet, from the configuration of its model.

        Raises UsageError for a configuration that does not say what the layers are.
        """
        if preview.layers is None:
            raise UsageError(
                f"the configuration of {preview.id} does not say what its layers are",
                "prefill the document, and plan for that",
                code="unknown-layers",
                field="model",
            )
        tokens = len(ChatTemplate(preview.tokenizer).open_document(text).ids)
        states = None if preview.has_states else 0
        return cls.split(preview.id, tokens, preview.layers, preview.dtype.itemsize, states)

    @classmethod
    def split(
        cls, model: str, T: int, layers: Sequence[LayerGeometry], itemsize: int, states: int | None
    ) -> Target:
        """The target for a model with these layers, of all processes' heads."""
        full = {i: x for i, x in enumerate(layers) if x.window is None}
        sliding = {i: x for i, x in enumerate(layers) if x.window is not None}
        return cls(model, T, full, itemsize, sliding, states)

    def shapes(
        self, store: str | Mapping[int, str] = NATIVE, positions: bool = False
    ) -> list[LayerShape]:
        """The shapes of the layers, in order, with entries stored as `store` (one for all, or by
        layer), with or without `positions`."""
        names = dict.fromkeys(self.layers, store) if isinstance(store, str) else store
        return [
            _shape(layer, self.T, self.itemsize, names.get(i, NATIVE), positions)
            for i, layer in self.layers.items()
        ]

    def tails(self, stores: Mapping[int, str]) -> list[LayerShape]:
        """The shapes of what is kept of the sliding layers, in order, stored as `stores` say."""
        return [
            _shape(
                layer, min(self.T, (layer.window or 1) - 1), self.itemsize, stores.get(i, NATIVE)
            )
            for i, layer in self.sliding.items()
        ]

    @property
    def full_bytes(self) -> int:
        """Bytes of the uncompacted keys and values of the layers that can be compacted."""
        return sum(shape.full_bytes for shape in self.shapes())


def _shape(
    layer: LayerGeometry, tokens: int, itemsize: int, store: str, positions: bool = False
) -> LayerShape:
    """The shape of a layer of so many tokens, stored as `store`."""
    quantizer = quantizer_of(store)
    dims, packed, group, shared = (layer.key_dim, layer.value_dim), None, 0, 0
    if quantizer is not None:
        packed, group = quantizer.entry_bytes(*dims), quantizer.group
        shared = quantizer.group_bytes(layer.key_dim)
    if positions:
        packed = (sum(dims) * itemsize if packed is None else packed) + POSITION_BYTES
    return LayerShape(layer.kv_heads, tokens, *dims, itemsize, packed, group, shared)


@dataclass(frozen=True)
class LayerPlan:
    """One layer to compact.

    layer    its index in the model
    shape    its heads and dimensions, and what a stored entry costs
    store    how its entries are stored: one of `STORES`
    entries  mean entries per head. Where heads and layers share by scores, which are not known
             yet, what the budget expects the layer to get
    """

    layer: int
    shape: LayerShape
    store: str
    entries: int

    def nbytes(self, beta: bool) -> int:
        """Bytes of these entries, with their biases or without."""
        return self.shape.stored_bytes([self.entries] * self.shape.heads, beta)


@dataclass(frozen=True)
class Plan:
    """A compaction that has been decided.

    method     the method
    queries    where its reference queries come from
    budget     how heads share the entries: a name of `budgets.NAMES`, `all` or `file`
    file       the budget file, if one was given
    layers     the layers to compact, in order
    size       the size asked for: `ratio`, or `tokens` per head
    named      whether the user named the store, so that what it does is measured
    positions  whether the token of each entry is stored
    sliding    stores of sliding layers, by index, which are stored whole; all others native
    """

    target: Target
    method: Method
    queries: QueryPlan
    budget: str
    file: BudgetFile | None
    layers: tuple[LayerPlan, ...]
    size: Mapping[str, float | int]
    seed: int
    memory_limit: int | None
    named: bool
    positions: bool
    sliding: Mapping[int, str] = field(default_factory=dict)

    @property
    def shapes(self) -> list[LayerShape]:
        """Shapes of the layers to compact, in order, as stored."""
        return [layer.shape for layer in self.layers]

    @property
    def store(self) -> str:
        """How entries are stored: one of `STORES`, or MIXED."""
        return store_of(list(self.stores.values()), bool(self.sliding))

    @property
    def stores(self) -> dict[int, str]:
        """How entries are stored, by the model's layer; layers that are not here are native."""
        return {**{x.layer: x.store for x in self.layers}, **self.sliding}

    @property
    def full_bytes(self) -> int:
        """Bytes of the uncompacted keys and values."""
        return sum(shape.full_bytes for shape in self.shapes)

    @property
    def stored_bytes(self) -> int:
        """Bytes that will be stored, by the entries that layers are expected to get."""
        return sum(x.nbytes(self.method.has_beta) for x in self.layers)

    @property
    def whole_ratio(self) -> float | None:
        """Full over stored bytes of all that the model keeps, sliding windows and states included;
        None where that is unknown."""
        if self.target.states is None:
            return None
        tails, states = self.target.tails(self.sliding), self.target.states
        full = self.full_bytes + states + sum(x.full_bytes for x in tails)
        kept = sum(x.stored_bytes([x.tokens] * x.heads, beta=False) for x in tails)
        stored = self.stored_bytes + states + kept
        return full / stored if stored else 1.0

    def allocate(self, scores: Sequence[torch.Tensor]) -> Lengths:
        """Entries per layer and head, by the scores `[H, T]` of each layer's keys."""
        layers = self.shapes
        if self.method.selection == "all":
            return [[layer.tokens] * layer.heads for layer in layers]

        def share(total: int) -> Lengths:
            if self.file is not None:
                return self.file.allocate(total, layers)
            return budgets.allocate(self.budget, total, layers, scores)

        return share(_total(self.size, layers, self.method, share))

    def record(self) -> dict[str, Any]:
        """The plan as JSON."""
        full, stored, whole = self.full_bytes, self.stored_bytes, self.whole_ratio
        return {
            "model": self.target.model,
            "tokens": self.target.T,
            "method": self.method.name,
            "queries": self.queries.name,
            "budget": self.budget,
            "requested": dict(self.size),
            "store": self.store,
            "seed": self.seed,
            "full_bytes": full,
            "stored_bytes": stored,
            "ratio": round(full / stored, 4) if stored else 1.0,
            "whole_ratio": None if whole is None else round(whole, 4),
            "layers": [
                {
                    "layer": x.layer,
                    "heads": x.shape.heads,
                    "store": x.store,
                    "entries": x.entries,
                    "bytes": x.nbytes(self.method.has_beta),
                }
                for x in self.layers
            ],
        }


def store_of(names: Sequence[str], mixed: bool = False) -> str:
    """The store that all compacted layers have, or MIXED."""
    if mixed or len(set(names)) > 1:
        return MIXED
    return names[0] if names else NATIVE


def decide(target: Target, request: Request, changes: Callable[[], Changes]) -> Plan:
    """The plan for a request.

    changes  what 4 bits do to each layer, by which the store `auto` is decided; called only where
             the sizes do not decide it, as finding out needs the model

    Raises UsageError for what makes no sense or does not fit the model, ModelMismatchError for a
    budget file of another model.
    """
    method = check(request, target.T)
    if not target.layers and method.selection != "all":
        raise UsageError(
            f"{target.model} has only sliding-window layers: nothing to compact",
            "prefill the document and chat with that",
            code="nothing-to-compact",
        )
    file = request.budget if isinstance(request.budget, BudgetFile) else None
    budget = FILE if file is not None else str(request.budget or method.budget)
    if method.selection == "all":
        file, budget = None, "all"
    if file is not None:
        file.require_fit(target.model, list(target.layers), target.shapes())
    stores, size = _stores(target, request, method, changes), request.size(method)
    shapes = target.shapes(stores, request.positions)
    planned = _entries(shapes, method, size, budget, file)
    return Plan(
        target=target,
        method=method,
        queries=request.query_plan(method),
        budget=budget,
        file=file,
        layers=tuple(
            LayerPlan(i, shape, stores.get(i, NATIVE), entries)
            for i, shape, entries in zip(target.layers, shapes, planned, strict=True)
        ),
        size=size,
        seed=request.seed,
        memory_limit=request.memory_limit,
        named=request.store not in (None, AUTO),
        positions=request.positions,
        sliding={i: x for i, x in stores.items() if i not in target.layers and x != NATIVE},
    )


def _stores(
    target: Target, request: Request, method: Method, changes: Callable[[], Changes]
) -> dict[int, str]:
    """How entries are stored, by layer. Raises UsageError where they cannot be stored that way."""
    store, ratio = request.storage(method), request.size(method).get("ratio")
    if store == AUTO:

        def holds(stores: Mapping[int, str]) -> bool:
            shapes = target.shapes(stores, request.positions)
            return ratio is not None and holds_every_key(ratio, shapes, method.has_beta)

        return {**chosen(target.layers, holds, changes), **dict.fromkeys(target.sliding, FINE)}
    stores = dict.fromkeys(target.layers, store) if isinstance(store, str) else dict(store)
    for i, layer in target.layers.items():
        _require_fit(stores.get(i, NATIVE), layer, target.model)
    return stores


def _require_fit(store: str, layer: LayerGeometry, model: str) -> None:
    """Raises UsageError for dimensions that a store cannot take."""
    quantizer = quantizer_of(store)
    if quantizer is None or fits(store, layer):
        return
    for d, n in zip((layer.key_dim, layer.value_dim), quantizer.multiples, strict=True):
        if d % n:
            wanted = "even head dimensions" if n == 2 else f"head dimensions that {n} divides"
            raise UsageError(
                f"store {quantizer.name} wants {wanted}, {model} has {d}",
                "use store auto",
                code="store-wants-even",
                field="store",
                store=quantizer.name,
                wanted=wanted,
                model=model,
                dim=d,
            )


def _entries(
    layers: Sequence[LayerShape],
    method: Method,
    size: Mapping[str, float | int],
    budget: str,
    file: BudgetFile | None,
) -> list[int]:
    """Entries that a head of each layer gets, before scores are known: at least, or with a file on
    average."""
    if method.selection == "all":
        return [layer.tokens for layer in layers]

    def share(total: int) -> Lengths:
        if file is not None:
            return file.allocate(total, layers)
        return budgets.unscored(budget, total, layers)

    lengths = share(_total(size, layers, method, share))
    if file is not None:
        return [sum(heads) // max(1, len(heads)) for heads in lengths]
    return [min(heads, default=0) for heads in lengths]


def _total(
    size: Mapping[str, float | int],
    layers: Sequence[LayerShape],
    method: Method,
    share: Callable[[int], Lengths],
) -> int:
    """Entries of all heads together, from the size asked for."""
    if "tokens" in size:
        return int(size["tokens"]) * sum(layer.heads for layer in layers)
    ratio = float(size["ratio"])
    return budgets.entries_for_ratio(ratio, layers, beta=method.has_beta, allocate=share)
