"""A method is a short declaration of the pieces it uses, kept in a registry by name.

To add one, write a small module that calls `register(Method(...))` and import it in
`recipes.py`. A method that only ranks keys (SnapKV, Knorm, ...) gives a `score` callable,
`selection="top"`, `mass="none"` and `values="original"`. One that scores by more than the
statistics of `ScoreState` also gives `watch`, which sees every query as it attends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from amcli.entries.ragged import RaggedHeads
from amcli.errors import UsageError, did_you_mean
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
    """Queries of one layer as they attend: those of `m` tokens fed in one go.

    Q          `[H, G, m, d]`, post-RoPE, `G` query heads to a KV head
    K          `[H, T, d]`, the context's keys; row `i` sees those with index below `limit[i]`
    fed        `[H, f, d]`, keys fed since, below `fed_limit[i]`; None in a pass over the context
    first      position of the first row
    part       positions of the context that the passage is about
    logits     their scale and softcap
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
    """Keeps of one layer's queries what a method scores by, in bounded memory.

    Independent of the budget, so that one pass serves every ratio.
    """

    def update(self, look: Look) -> None:
        """Take in the queries of some more tokens; called in order of position."""


@dataclass(frozen=True)
class ScoreContext:
    """What a `score` callable may look at, for one layer.

    K `[H, T, d]`, V `[H, T, dv]`, layer and layers: index and number of the compacted layers,
    seed; `extra` carries what a family of methods wants besides.

    sample    reference queries, empty when the method asked for none; see `Q` and `weights`
    watched   what the method's `watch` made, after the pass
    entries   entries a head of this layer gets, the mean where heads differ
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
    """Gives entries back as they will be read from where they are stored in few bits.

    Both take and return `[..., dim]` and treat every row alike; float32 comes back. Rounding
    twice gives the same as once.
    """

    def round_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys as they will be read back."""

    def round_values(self, values: torch.Tensor) -> torch.Tensor:
        """Values as they will be read back."""


@dataclass(frozen=True)
class LayerInput:
    """One layer to compact: to `lengths[h]` entries a head.

    sample  its reference queries, and what is known of them
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

    Errors are over the reference queries, of the entries as stored; nan with no queries.
    """

    heads: RaggedHeads
    index: torch.Tensor
    mass_error: torch.Tensor
    output_error: torch.Tensor


class LayerFit(Protocol):
    """Replaces `layers.compact_layer` for a method that selects and fits in its own way."""

    def __call__(self, layer: LayerInput, rounding: Rounding | None = None) -> LayerResult:
        """The layer's entries; with `rounding` as they will be read back, in float32."""


@dataclass(frozen=True)
class Method:
    """Which pieces a method uses. The defaults are the best that was measured.

    name, summary   what `--method` takes and what the help says of it
    score_kind      statistic of the reference queries' softmax that ranks keys; None: the one
                    that suits the source of the queries
    score           replaces `score_kind`: `score(ctx) -> [H, T]`, larger is better
    queries         whether it needs reference queries at all
    source          where they come from unless the user says otherwise
    store           how entries are stored unless the user says otherwise
    watch           makes a `Watcher` a layer, shown to `score`; the source is then fixed
    window          how many of the last tokens' queries it watches; None: all
    rope            needs queries before RoPE, and the rotations to come
    selection       "omp", "top" by score, or "all"
    target, gamma, panel, candidates  how the pursuit goes; see `selection.OmpSettings`
    mass            "nnls" biases, or "none" (no beta is stored)
    values          "held-out" λ per head, "shrink" (λ = 1), "least-squares" or "original"
    budget          how entries are shared out unless the user says otherwise
    fit             replaces the selection and the fits; `selection`, `mass`, `values` then only
                    describe
    rerotate        move each head's kept keys together, up to the end of the context
    """

    name: str
    summary: str
    score_kind: ScoreKind | None = None
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
        """How its pursuit goes."""
        return OmpSettings(self.target, self.gamma, self.panel, self.candidates, seed=seed)


_REGISTRY: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry and return it. Raises ValueError for a name already taken."""
    if method.name in _REGISTRY:
        raise ValueError(f"method {method.name!r} is registered twice")
    _REGISTRY[method.name] = method
    return method


def unregister(name: str) -> Method:
    """Take a method out of the registry again, and return it. Raises UsageError as `get`."""
    method = get(name)
    del _REGISTRY[name]
    return method


def names() -> list[str]:
    """Names of all methods, in the order of registration (the default first)."""
    return list(_REGISTRY)


def get(name: str) -> Method:
    """The method of that name. Raises UsageError with the nearest name and the list."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    meant = did_you_mean(name, _REGISTRY)
    raise UsageError(f"unknown method {name!r}", hint=f"{meant}methods: {', '.join(names())}")
