"""What the user asks of a compaction, and the checks that it makes sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amcli.entries.catalogue import STORES
from amcli.errors import UsageError
from amcli.matching import budgets, methods
from amcli.matching.catalogue import DEFAULT
from amcli.matching.methods import Method
from amcli.pipeline.compaction.budget_file import BudgetFile
from amcli.pipeline.compaction.defaults import AUTO, AUTO_FIDELITY, DEFAULT_RATIO
from amcli.pipeline.queries import passages
from amcli.pipeline.queries.passes import QueryPlan


@dataclass(frozen=True)
class Request:
    """What the user asked for; `plan.decide` turns it into a plan.

    ratio, tokens  full bytes over stored bytes, or mean entries per KV head. A ratio may be `auto`:
                   the largest with a fidelity of AUTO_FIDELITY
    fidelity       instead of both: look for the largest ratio at which this share of what the
                   document contributes is kept (`fidelity.search`)
    budget         one of `budgets.NAMES`, a budget file already read, or None for the method's own
    max_queries    reference queries per KV head for the fits; None: what suits the device
    queries        names of `passages.SOURCES`, joined by `+`; None for the method's own
    window         most recent tokens that snapkv and pyramidkv look from and keep; None: 64, or
                   fewer where that would be more than a quarter of a head's entries
    store          how entries are stored: one of `STORES`, `auto`, or None for the method's own;
                   or one of `STORES` for each layer, by its index (native where there is none)
    memory_limit   bytes that the fits may take besides the cache; None: what suits the device
    positions      whether to store the token that each entry was taken from too
    """

    ratio: float | str | None = None
    tokens: int | None = None
    fidelity: float | None = None
    method: str = DEFAULT
    budget: str | BudgetFile | None = None
    queries: str | None = None
    seed: int = 0
    max_queries: int | None = None
    window: int | None = None
    store: str | Mapping[int, str] | None = None
    memory_limit: int | None = None
    positions: bool = False

    @classmethod
    def of(cls, budget: str | None = None, **given: Any) -> Request:
        """A request from the options given; None stands for the default.

        A budget may be the path of a file, which is read; see `budget_named`.
        """
        known = {name: value for name, value in given.items() if value is not None}
        return cls(budget=budget_named(budget), **known)

    def query_plan(self, method: Method) -> QueryPlan:
        """Where a method's queries come from."""
        source = (self.queries or method.source) if method.queries else None
        sources = () if source is None else passages.sources(source)
        return QueryPlan(sources, self.seed, self.max_queries, self.window)

    def storage(self, method: Method) -> str | Mapping[int, str]:
        """How entries are stored: `auto`, one of `STORES`, or one of `STORES` for each layer."""
        return self.store or method.store

    @property
    def share(self) -> float | None:
        """The fidelity to look for a ratio with; None: the size was asked for."""
        return AUTO_FIDELITY if self.ratio == AUTO else self.fidelity

    def size(self, method: Method) -> dict[str, float | int]:
        """The size asked for, as the manifest records it: `ratio` or `tokens`."""
        if self.share is not None:
            raise ValueError("the ratio has yet to be found")
        if self.tokens is not None:
            return {"tokens": self.tokens}
        if self.ratio is None and method.selection == "all":
            return {"ratio": 1.0}
        return {"ratio": DEFAULT_RATIO if self.ratio is None else float(self.ratio)}


def budget_named(name: str | None) -> str | BudgetFile | None:
    """The budget of that name, or else the budget file at that path, read.

    Raises UsageError for what is neither, and for a file that is not a budget.
    """
    if name is None or name in budgets.NAMES:
        return name
    path = Path(name)
    if not path.exists():
        known = ", ".join(budgets.NAMES)
        raise UsageError(
            f"unknown budget {name!r}: no such name, and no such file",
            f"budgets: {known}, or a file that a compaction wrote",
            code="unknown-budget",
            field="budget",
            name=name,
            known=known,
        )
    return BudgetFile.read(path)


def check(request: Request, T: int | None = None) -> Method:
    """The method that a request names; an early UsageError for what makes no sense.

    T  tokens of the context, if already known
    """
    method = methods.get(request.method)
    _check_size(request, method, T)
    _check_store(request)
    if isinstance(request.budget, str) and request.budget not in budgets.NAMES:
        raise UsageError(
            f"unknown budget {request.budget!r}",
            f"budgets: {', '.join(budgets.NAMES)}",
            code="unknown-budget",
            field="budget",
            name=request.budget,
            known=", ".join(budgets.NAMES),
        )
    _check_queries(request, method)
    return method


def _check_store(request: Request) -> None:
    """Raises UsageError for a name that is no store."""
    store = request.store
    by_layer = isinstance(store, Mapping)
    names = store.values() if isinstance(store, Mapping) else [store]
    for name in names:
        if name not in STORES and (by_layer or name not in (None, AUTO)):
            raise UsageError(
                f"unknown store {name!r}",
                f"stores: {', '.join((AUTO, *STORES))}",
                code="unknown-store",
                field="store",
            )


def _check_size(request: Request, method: Method, T: int | None) -> None:
    """Raises UsageError for an impossible ratio or number of tokens."""
    _check_search(request, method)
    ratio, tokens = request.ratio, request.tokens
    if ratio is not None and tokens is not None:
        raise UsageError(
            "ratio and tokens exclude each other",
            "give one of them",
            code="sizes-exclude",
            field="ratio",
            one="ratio",
            other="tokens",
        )
    if method.selection == "all" and (tokens or (ratio or 1) != 1):
        raise UsageError(
            f"method {method.name!r} keeps every key",
            "leave the ratio out, or use 1",
            code="method-keeps-all",
            field="ratio",
        )
    if isinstance(ratio, str):
        if ratio != AUTO:
            raise UsageError(
                f"a ratio of {ratio!r} is neither a number nor {AUTO!r}",
                "use a ratio such as 20",
                code="ratio-no-number",
                field="ratio",
            )
        return
    if ratio is not None and not ratio >= 1:
        raise UsageError(
            f"a ratio of {ratio:g} is below 1",
            "use a ratio such as 20",
            code="ratio-below-1",
            field="ratio",
            ratio=ratio,
        )
    if tokens is not None and tokens < 1:
        raise UsageError(
            f"{tokens} tokens a head are below 1",
            "use a number such as 256",
            code="tokens-below-1",
            field="tokens",
            tokens=tokens,
        )
    if T is not None and ratio is not None and ratio > T:
        raise UsageError(
            f"a ratio of {ratio:g} is more than the context has tokens ({T:,})",
            f"use a ratio between 1 and {T}",
            code="ratio-above-length",
            field="ratio",
            ratio=ratio,
            length=T,
        )
    if T is not None and tokens is not None and tokens > T:
        raise UsageError(
            f"{tokens:,} tokens a head are more than the context has ({T:,})",
            f"use a number up to {T}",
            code="tokens-above-length",
            field="tokens",
            tokens=tokens,
            length=T,
        )


def _check_search(request: Request, method: Method) -> None:
    """Raises UsageError for an impossible fidelity, and for options that rule out a search."""
    fidelity = request.fidelity
    if fidelity is None:
        return
    if not 0 < fidelity <= 1:
        raise UsageError(
            f"a fidelity of {fidelity:g} is not a share: above 0, and at most 1",
            "for example 0.98",
            code="fidelity-no-share",
            field="fidelity",
            fidelity=fidelity,
        )
    for name, value in (("ratio", request.ratio), ("tokens", request.tokens)):
        if value is not None:
            raise UsageError(
                f"fidelity and {name} exclude each other",
                "give one of them",
                code="sizes-exclude",
                field="fidelity",
                one="fidelity",
                other=name,
            )
    if method.selection == "all":
        raise UsageError(
            f"method {method.name!r} keeps every key: there is nothing to search for",
            "leave the fidelity out, or choose another method",
            code="nothing-to-search",
            field="fidelity",
        )


def _check_queries(request: Request, method: Method) -> None:
    """Raises UsageError for queries or a window that the method cannot use."""
    if request.queries is not None:
        passages.sources(request.queries)
    if method.watch is not None and request.queries not in (None, method.source):
        raise UsageError(
            f"method {method.name!r} is defined by its own queries ({method.source}), "
            f"not by {request.queries!r}",
            "leave queries out",
            code="queries-of-method",
            field="queries",
        )
    if request.window is not None and request.window < 1:
        raise UsageError(
            f"a window of {request.window} tokens is below 1",
            "use 64, for example",
            code="window-below-1",
            field="window",
        )
