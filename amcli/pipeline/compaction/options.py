"""What the user asks of a compaction, and what of it makes no sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from amcli.entries.catalogue import STORES
from amcli.errors import UsageError
from amcli.matching import budgets, methods
from amcli.matching.methods import Method
from amcli.pipeline.compaction.budget_file import BudgetFile
from amcli.pipeline.queries import passages, reference

DEFAULT_RATIO = 20.0

AUTO = "auto"
"""The store as `choices` has it for the document and the size at hand."""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    ratio, tokens  full bytes over stored bytes, or mean entries per KV head: at most one
    budget         one of `budgets.NAMES`, the path of a budget file, or None for the method's own
    queries        names of `passages.SOURCES`, joined by `+`; None for the method's own
    window         most recent tokens that snapkv and pyramidkv look from and keep; None: 64, or
                   fewer where that would be more than a quarter of a head's entries
    store          how entries are stored: one of `catalogue.STORES`, `auto`, or None for the
                   method's own
    memory_limit   bytes that the fits may take beside the cache; None: what suits the device
    positions      whether the token that each entry was taken from is stored too
    """

    ratio: float | None = None
    tokens: int | None = None
    method: str = "omp"
    budget: str | None = None
    queries: str | None = None
    seed: int = 0
    max_queries: int = reference.MAX_QUERIES
    window: int | None = None
    store: str | None = None
    memory_limit: int | None = None
    positions: bool = False

    def source(self, method: Method) -> str:
        """Where a method's queries come from: `none`, or names of `passages.SOURCES`."""
        return (self.queries or method.source) if method.queries else "none"

    def storage(self, method: Method) -> str:
        """How entries are stored: `auto`, or one of `catalogue.STORES`."""
        return self.store or method.store

    def requested(self, method: Method) -> dict[str, float | int]:
        """The size that was asked for, as the manifest records it."""
        if self.tokens is not None:
            return {"tokens": self.tokens}
        if self.ratio is None and method.selection == "all":
            return {"ratio": 1.0}
        return {"ratio": DEFAULT_RATIO if self.ratio is None else float(self.ratio)}


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
    budget_of(options)
    if options.store not in (None, AUTO, *STORES):
        known = ", ".join((AUTO, *STORES))
        raise UsageError(f"unknown store {options.store!r}", f"stores: {known}")
    _check_queries(options, method)
    if method.selection == "all" and (options.tokens or (options.ratio or 1) != 1):
        raise UsageError(
            f"method {method.name!r} keeps every key", "leave --ratio out, or use --ratio 1"
        )
    return method


def budget_of(options: Options) -> BudgetFile | None:
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
    if options.queries is not None:
        passages.sources(options.queries)
    if method.watch is not None and options.queries not in (None, method.source):
        raise UsageError(
            f"method {method.name!r} is defined by its own queries ({method.source}), "
            f"not by {options.queries!r}",
            "leave --queries out",
        )
    if options.window is not None and options.window < 1:
        raise UsageError(f"a window of {options.window} tokens is below 1", "use 64, for example")
