"""A method is a short declaration of the pieces it uses, kept in a registry by name.

To add one, write a small module that calls `register(Method(...))` and import it in
`recipes.py`. A method that only ranks keys (SnapKV, Knorm, ...) gives a `score` callable,
`selection="top"`, `mass="none"` and `values="original"`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from amcli.errors import UsageError

from .scores import ScoreKind
from .selection import Target

SelectionKind = Literal["omp", "top", "all"]
MassKind = Literal["nnls", "none"]
ValuesKind = Literal["held-out", "shrink", "least-squares", "original"]
BudgetKind = Literal["adaptive", "uniform", "all"]

LAMBDA_OF: dict[ValuesKind, float | Literal["held-out"] | None] = {
    "held-out": "held-out",
    "shrink": 1.0,
    "least-squares": 0.0,
    "original": None,
}
"""λ of the value fit for each kind."""


@dataclass(frozen=True)
class ScoreContext:
    """What a `score` callable may look at, for one layer.

    Q `[H, n, d]` reference queries (None when the method asked for none), K `[H, T, d]`,
    V `[H, T, dv]`, weights `[H, n]` or None, layer and layers: index and number of the
    compacted layers, seed; `extra` carries what a family of methods wants besides.
    """

    Q: torch.Tensor | None
    K: torch.Tensor
    V: torch.Tensor
    scale: float
    softcap: float | None = None
    weights: torch.Tensor | None = None
    layer: int = 0
    layers: int = 1
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


ScoreFunction = Callable[[ScoreContext], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """Which pieces a method uses. The defaults are the best that was measured.

    name, summary   what `--method` takes and what the help says of it
    score_kind      statistic of the reference queries' softmax that ranks keys
    score           replaces `score_kind`: `score(ctx) -> [H, T]`, larger is better
    queries         whether it needs reference queries at all
    selection       "omp", "top" by score, or "all"
    target          what OMP approximates: "joint" (mass and outputs) or "mass"
    mass            "nnls" biases, or "none" (no beta is stored)
    values          "held-out" λ per head, "shrink" (λ = 1), "least-squares" or "original"
    budget          how entries are shared out unless the user says otherwise
    """

    name: str
    summary: str
    score_kind: ScoreKind = "max"
    score: ScoreFunction | None = None
    queries: bool = True
    selection: SelectionKind = "omp"
    target: Target = "joint"
    gamma: float = 0.375
    panel: int = 16
    candidates: int = 8
    mass: MassKind = "nnls"
    values: ValuesKind = "held-out"
    budget: BudgetKind = "adaptive"

    @property
    def has_beta(self) -> bool:
        """Whether entries carry a bias, which costs bytes."""
        return self.mass != "none"


_REGISTRY: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry and return it. Raises ValueError for a name already taken."""
    if method.name in _REGISTRY:
        raise ValueError(f"method {method.name!r} is registered twice")
    _REGISTRY[method.name] = method
    return method


def names() -> list[str]:
    """Names of all methods, in the order of registration (the default first)."""
    return list(_REGISTRY)


def get(name: str) -> Method:
    """The method of that name. Raises UsageError with the nearest name and the list."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name.lower(), _REGISTRY, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown method {name!r}", hint=f"{meant}methods: {', '.join(names())}")
