"""A method is a short declaration of the pieces it uses, kept in a registry by name.

To add one, write a small module with a `Method` and name it in `catalogue`, or in an entry point of
another package (see `plugins`). Each is loaded when first asked for. A method that only ranks keys
(SnapKV, Knorm, ...) gives a `score` callable, `selection="top"`, `mass="none"` and
`values="original"`. One that scores by more than the statistics of `ScoreState` also gives `watch`,
which sees every query as it attends.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Protocol

import torch

from amcli.entries.ragged import Entries
from amcli.errors import AmkvWarning, UsageError, did_you_mean
from amcli.matching import plugins
from amcli.matching.catalogue import METHODS
from amcli.matching.plugins import Plugin
from amcli.matching.sample import Sample
from amcli.matching.scores import ScoreKind
from amcli.matching.selection import OmpSettings, Target
from amcli.matching.tiles import Logits

SelectionKind = Literal["omp", "top", "all"]
MassKind = Literal["nnls", "none"]
ValuesKind = Literal["held-out", "shrink", "least-squares", "original"]
BudgetKind = Literal["adaptive", "uniform", "adakv", "global", "pyramid", "all"]

LAMBDA_OF: dict[ValuesKind, float | Literal["held-out"] | None] = {
    "held-out": "held-out",
    "shrink": 1.0,
    "least-squares": 0.0,
    "original": None,
}
"""λ of the value fit for each kind."""


@dataclass(frozen=True)
class Look:
    """Queries of one layer as they attend: those of `m` tokens fed at once.

    Q          `[H, G, m, d]`, post-RoPE, `G` query heads per KV head
    K          `[H, T, d]`, the context's keys; row `i` sees those with index below `limit[i]`
    fed        `[H, f, d]`, keys fed since, below `fed_limit[i]`; None in a pass over the context
    first      position of the first row
    part       positions of the context that the passage is about
    logits     scale and softcap of the logits
    unrotated  `[H, G, m, d]` float32, Q before RoPE; None unless the method asks for `rope`
    """

    Q: torch.Tensor
    K: torch.Tensor
    limit: torch.Tensor
    fed: torch.Tensor | None
    fed_limit: torch.Tensor | None
    first: int
    part: slice
    logits: Logits
    unrotated: torch.Tensor | None = None

    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`(Q [H, G·m, d], limit [G·m], fed_limit [G·m])`, groups folded into the rows."""
        G = self.Q.shape[1]
        fed_limit = None if self.fed_limit is None else self.fed_limit.repeat(G)
        return self.Q.flatten(1, 2), self.limit.repeat(G), fed_limit


class Watcher(Protocol):
    """Keeps what a method needs from one layer's queries to score keys, in bounded memory.

    Independent of the budget, so that one pass serves every ratio.
    """

    def update(self, look: Look) -> None:
        """Add the queries of more tokens; called in order of position."""


@dataclass(frozen=True)
class ScoreContext:
    """What a `score` callable may look at, for one layer.

    K `[H, T, d]`, V `[H, T, dv]`, layer and layers: the index among the compacted layers and their
    number, seed; `extra` carries whatever else a family of methods needs.

    sample    reference queries, empty when the method asked for none; see `Q` and `weights`
    watched   what the method's `watch` made, after the pass
    entries   entries per head of this layer, the mean if heads differ
    budget    name of the budget
    window    most recent tokens to look from, as the user set it; None: the method's own
    rotation  `[d, d]`, mean rotation of RoPE over the next FUTURE positions: `q -> rotation @ q`;
              None unless the method asks for `rope`
    """

    sample: Sample
    K: torch.Tensor
    V: torch.Tensor
    layer: int = 0
    layers: int = 1
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    watched: Watcher | None = None
    entries: int = 0
    budget: str = "uniform"
    window: int | None = None
    rotation: torch.Tensor | None = None

    @property
    def Q(self) -> torch.Tensor | None:
        """Reference queries `[H, n, d]`; None when the method asked for none."""
        return self.sample.Q if self.sample.Q.shape[1] else None

    @property
    def weights(self) -> torch.Tensor | None:
        """Their share of attention on the document, `[H, n]`; None: 1."""
        return self.sample.W

    @property
    def logits(self) -> Logits:
        """Scale and softcap of the layer's logits; `ctx.logits(Q, K)` makes them."""
        return self.sample.logits

    def first(self, count: int) -> torch.Tensor:
        """`[T]` bool, True for the `count` oldest keys."""
        return torch.arange(self.K.shape[1], device=self.K.device) < count

    def last(self, count: int) -> torch.Tensor:
        """`[T]` bool, True for the `count` most recent keys."""
        return torch.arange(self.K.shape[1], device=self.K.device) >= self.K.shape[1] - count


ScoreFunction = Callable[[ScoreContext], torch.Tensor]
WatchFunction = Callable[[], Watcher]

FUTURE = 512
"""Positions after the context that a `rope` method averages over."""

SINKS = 4
"""First tokens that methods with sinks always keep."""


class Rounding(Protocol):
    """Returns entries as they will be read back after being stored in few bits, in float32.

    Rounding twice gives the same as once. Numbers that cannot be stored raise UnstorableError, with
    the head.
    """

    def round_keys(self, keys: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Keys `[H, n, d]` as they will be read back. Keys of a head may influence each other: head
        `h` has its first `lengths[h]`, in the order in which they will be stored, which is that of
        their positions. What follows is padding and may be anything."""

    def round_values(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[H, n, dv]` as they will be read back, each by itself."""


@dataclass(frozen=True)
class LayerInput:
    """One layer to compact, to `lengths[h]` entries in head `h`.

    sample  its reference queries, and what is known about them
    K, V    `[H, T, d]` and `[H, T, dv]`, the document
    scores  `[H, T]`, from `ScoreState` or the method's `score`
    """

    sample: Sample
    K: torch.Tensor
    V: torch.Tensor
    scores: torch.Tensor
    lengths: Sequence[int]


@dataclass(frozen=True)
class LayerResult:
    """One compacted layer.

    heads         the entries, in order of position within each head
    index         `[N]` int32, position in the document of each entry, in the same order
    mass_error, output_error  `[H]`, see `fit_errors.FitErrors`; 1 for an empty head

    Errors are those of the entries as stored, over the reference queries; nan without queries.
    """

    heads: Entries
    index: torch.Tensor
    mass_error: torch.Tensor
    output_error: torch.Tensor


class LayerFit(Protocol):
    """Replaces `layers.compact_layer` for a method that selects and fits in its own way."""

    def __call__(self, layer: LayerInput, rounding: Rounding | None = None) -> LayerResult:
        """The layer's entries; with `rounding` as they will be read back, in float32."""


@dataclass(frozen=True)
class Method:
    """Which pieces a method uses. The defaults are the best measured.

    name            its name
    score_kind      statistic of the reference queries' softmax that ranks keys
    score           replaces `score_kind`: `score(ctx) -> [H, T]`, larger is better
    queries         whether it needs reference queries at all
    source          where they come from unless the user says otherwise
    store           how entries are stored unless the user says otherwise
    watch           makes a `Watcher` per layer, passed to `score`; the source is then fixed
    window          how many of the last tokens' queries it watches; None: all
    rope            needs queries before RoPE, and the rotations of future positions
    selection       "omp", "top" by score, or "all"
    target, gamma, panel, candidates  settings of the pursuit; see `selection.OmpSettings`
    mass            "nnls" biases, or "none" (no beta is stored)
    values          "held-out" λ per head, "shrink" (λ = 1), "least-squares" or "original"
    budget          how entries are shared out unless the user says otherwise
    fit             replaces the selection and the fits; `selection`, `mass` and `values` then
                    only describe it
    rerotate        moves each head's kept keys next to each other, up to the end of the context
    """

    name: str
    score_kind: ScoreKind = "rms"
    score: ScoreFunction | None = None
    queries: bool = True
    source: str = "repeat"
    store: str = "native"
    watch: WatchFunction | None = None
    window: int | None = None
    rope: bool = False
    selection: SelectionKind = "omp"
    target: Target = OmpSettings.target
    gamma: float = OmpSettings.gamma
    panel: int = OmpSettings.panel
    candidates: int = OmpSettings.candidates
    mass: MassKind = "none"
    values: ValuesKind = "held-out"
    budget: BudgetKind = "adaptive"
    fit: LayerFit | None = None
    rerotate: bool = False

    @property
    def has_beta(self) -> bool:
        """Whether entries carry a bias, which costs bytes."""
        return self.mass != "none"

    def pursuit(self, seed: int) -> OmpSettings:
        """The settings of its pursuit."""
        return OmpSettings(self.target, self.gamma, self.panel, self.candidates, seed=seed)


REGISTRY: dict[str, Method] = {}
"""The methods loaded so far, and those that this process registered itself."""


def register(method: Method) -> Method:
    """Add a method for this process and return it. Raises ValueError for a name already taken."""
    if method.name in names():
        raise ValueError(f"method {method.name!r} is registered twice")
    REGISTRY[method.name] = method
    return method


def unregister(name: str) -> Method:
    """Take a method out of the registry again, and return it. Raises UsageError as `get`."""
    method = get(name)
    del REGISTRY[name]
    return method


def names() -> list[str]:
    """Names of all methods: built-in ones (the default first), registered ones, plug-ins."""
    return list(dict.fromkeys([*METHODS, *REGISTRY, *plugins.names()]))


def loaded() -> list[Method]:
    """The methods asked for or registered so far."""
    return list(REGISTRY.values())


def get(name: str, also: Sequence[str] = ()) -> Method:
    """The method of that name, loaded when it is first asked for.

    also  further names that the caller accepts, for the list

    Raises UsageError for an unknown name, with the nearest one and the list, and for a method of
    another package that cannot be loaded, with the package and the cause. Where a package uses the
    name of a built-in method, the built-in method is taken, with a warning.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    brought = [plugin for plugin in plugins.plugins() if plugin.name == name]
    if name in METHODS:
        for plugin in brought:
            text = f"the method {name} of package {plugin.package} is left out: {name} is built in"
            warnings.warn(text, AmkvWarning, stacklevel=2)
        module, _, attribute = METHODS[name].place.partition(":")
        method: Method = getattr(import_module(f"amcli.matching.{module}"), attribute)
    elif brought:
        method = _of_package(brought)
    else:
        everything = [*names(), *also]
        raise UsageError(
            f"unknown method {name!r}",
            f"{did_you_mean(name, everything)}methods: {', '.join(everything)}",
            code="unknown-method",
            field="method",
            method=name,
        )
    REGISTRY[name] = method
    return method


def _of_package(brought: Sequence[Plugin]) -> Method:
    """The method that a package provides. Raises UsageError if it cannot be loaded."""
    name, packages = brought[0].name, " and ".join(sorted(plugin.package for plugin in brought))
    if len(brought) > 1:
        raise UsageError(
            f"method {name!r} comes from several packages: {packages}",
            "uninstall all but one of them",
            code="ambiguous-method",
            field="method",
            method=name,
            packages=packages,
        )
    origin: BaseException | None = None
    try:
        found = brought[0].load()
    except (Exception, SystemExit) as error:
        origin = error
        lines = str(error).strip().splitlines()
        cause = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    else:
        if isinstance(found, Method) and found.name == name:
            return found
        place, kind = brought[0].entry.value, type(found).__name__
        said = f"the method {found.name!r}" if isinstance(found, Method) else f"of type {kind}"
        cause = f"{place} is {said}"
    raise UsageError(
        f"method {name!r} of package {packages} cannot be loaded: {cause}",
        f"update or uninstall {packages}; other methods work without it",
        code="broken-method",
        field="method",
        method=name,
        package=packages,
        cause=cause,
    ) from origin
