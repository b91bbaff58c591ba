"""Reference passes over one context: those a method asks for, each run once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from amcli.matching import methods
from amcli.matching.methods import Method
from amcli.matching.scores import SCORE_KINDS, ScoreKind
from amcli.models.rotary import Rotary
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.queries.passages import SOURCES, Passage, context_passages
from amcli.pipeline.queries.reference import LayerReference, collect, mixed, most_queries
from amcli.system.clock import stopwatch
from amcli.system.progress import Progress

Made = TypeVar("Made")


@dataclass(frozen=True)
class QueryPlan:
    """Which reference queries a method gets.

    sources      names of `passages.SOURCES`, several for a mixture; () where a method uses no
                 queries
    max_queries  reference queries per KV head that the fits may use at most; None: what suits the
                 device
    window       most recent tokens to look from, as the user set it; None: the method's own
    """

    sources: tuple[str, ...]
    seed: int
    max_queries: int | None = None
    window: int | None = None

    @property
    def name(self) -> str:
        """As manifests have it: `repeat+self-study`, or `none`."""
        return "+".join(self.sources) or "none"

    def most(self, device: torch.device) -> int:
        """Reference queries per KV head on that device."""
        return most_queries(device) if self.max_queries is None else self.max_queries


class Passes:
    """Reference passes over one context, kept for further methods and ratios.

    A pass does not depend on the ratio, so a table of many cells needs few of them. `shared`
    means that several methods will follow, so every kind of score is kept at once; `search`, that
    one method will follow at several ratios, for which keys are then selected once.
    """

    def __init__(self, context: Context, shared: bool = True, search: bool = False) -> None:
        self.context = context
        self.shared = shared
        self.search = search
        self.done: dict[Hashable, tuple[Any, float]] = {}

    def get(self, key: Hashable, make: Callable[[], Made]) -> tuple[Made, float]:
        """What `make` returned for that key, and the seconds it took when it ran."""
        if key not in self.done:
            device = self.context.loaded.device
            began = stopwatch(device)
            self.done[key] = (make(), stopwatch(device) - began)
        return self.done[key]

    def remembering(self, found: dict[int, LayerReference]) -> dict[int, LayerReference]:
        """The same, with samples that keep what further methods and ratios will ask again."""
        for layer in found.values():
            layer.sample.kept = self.shared or self.search
            layer.sample.nested = self.search
        return found


def references(
    context: Context,
    method: Method,
    plan: QueryPlan,
    rotary: Rotary | None,
    passes: Passes,
    progress: Progress,
) -> tuple[dict[int, LayerReference], dict[str, float]]:
    """The queries a method asks for, `layer -> reference`, and the seconds of each stage."""
    if not plan.sources:
        return {}, {"reference": 0.0}
    last = method.window if plan.window is None else max(plan.window, method.window or 0)
    watched = method.watch is not None
    most = plan.most(context.loaded.device)
    sample = None if watched else (plan.seed, most)
    window = last if watched else None

    def ask(name: str) -> list[Passage]:
        if name == "context" and method.window is not None:
            return context_passages(context, last)
        return SOURCES[name](context, plan.seed, progress)

    kinds = _kinds(method, passes)

    def run(passages: list[Passage]) -> dict[int, LayerReference]:
        found = collect(
            context,
            passages,
            max_queries=most,
            seed=plan.seed,
            kinds=kinds,
            watch=method.watch,
            rotary=rotary if method.rope else None,
            progress=progress,
        )
        return passes.remembering(found)

    parts: list[dict[int, LayerReference]] = []
    keys: list[Hashable] = []
    seconds: dict[str, float] = {}
    for name in plan.sources:  # one by one: a source is used alone and in mixtures
        passages, asking = passes.get(("passages", name, plan.seed, window), partial(ask, name))
        if name == "self-study":
            seconds["self-study"] = asking
        keys.append((name, method.watch, window, kinds, sample))
        found, reading = passes.get(keys[-1], partial(run, passages))
        seconds["reference"] = seconds.get("reference", 0.0) + reading
        parts.append(found)
    if len(parts) == 1:
        return parts[0], seconds
    together, _ = passes.get(tuple(keys), lambda: passes.remembering(mixed(parts, most, plan.seed)))
    return together, seconds


def _kinds(method: Method, passes: Passes) -> tuple[ScoreKind, ...]:
    """The scores to keep: those that this method, or any that may follow it, asks for."""
    if passes.shared and method.watch is None:
        wanted = {other.score_kind for other in (method, *methods.loaded())}
        return tuple(kind for kind in SCORE_KINDS if kind in wanted)
    return () if method.score is not None else (method.score_kind,)
