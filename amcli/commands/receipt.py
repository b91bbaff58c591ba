"""What `amkv compact` reports: sizes, seconds, errors, and the heads that stand out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from amcli.entries.catalogue import MIXED, NATIVE
from amcli.storage.summary import fit_errors, in_all, stores_text
from amcli.system.units import bytes_text, error_text, seconds_text

if TYPE_CHECKING:
    from amcli.pipeline.compaction.result import Compaction

SHOWN = 5
"""Heads shown in each of the two tables."""

HUGE = 10
"""An error of which a receipt warns in any head: 1 is what an empty head has."""

GLANCE = 0.01
"""Attention to the document below which a head's errors are nobody's loss: the mass of next to
nothing is easily missed by a large factor."""


@dataclass(frozen=True)
class HeadFacts:
    """One compacted KV head: its entries, and what is known of it on held-out queries.

    attention  mean share of its attention that falls on the document
    """

    layer: int
    head: int
    entries: int
    mass_error: float | None
    output_error: float | None
    attention: float | None

    @property
    def worst(self) -> float:
        """The larger of the errors that are known; infinite for one that is no number."""
        known = [e for e in (self.mass_error, self.output_error) if e is not None]
        return max((e if e == e else math.inf for e in known), default=0.0)

    @property
    def is_lost(self) -> bool:
        """Whether its errors are huge, and it looks at the document at all."""
        seen = self.attention is None or not self.attention < GLANCE
        return seen and self.worst >= HUGE

    def record(self) -> dict[str, Any]:
        """The head as JSON."""
        return dict(vars(self))


def facts(result: Compaction) -> list[HeadFacts]:
    """All heads of the layers that were compacted, in order."""
    from amcli.pipeline.contexts.context import full_layers

    found = []
    for layer in full_layers(result.context):
        known: list[list[float]] = [[], [], []]
        if (e := result.errors) is not None:
            known = [e.mass[layer], e.output[layer], e.attention[layer]]
        for head, entries in enumerate(result.layers[layer].lengths):
            mass, output, attention = (values[head] if values else None for values in known)
            found.append(HeadFacts(layer, head, entries, mass, output, attention))
    return found


def most_entries(heads: Sequence[HeadFacts]) -> list[HeadFacts]:
    """The heads with the largest budgets, largest first."""
    return sorted(heads, key=lambda h: (-h.entries, h.layer, h.head))[:SHOWN]


def largest_errors(heads: Sequence[HeadFacts]) -> list[HeadFacts]:
    """The heads with the largest output error, largest first; unknown errors are left out."""
    known = [h for h in heads if h.output_error is not None]
    return sorted(known, key=lambda h: (-(h.output_error or 0.0), h.layer, h.head))[:SHOWN]


def record(result: Compaction, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `compact --json` about heads, errors and the search."""
    heads = facts(result)
    return {
        "fit_errors": fit_errors(manifest),
        "most_entries": [h.record() for h in most_entries(heads)],
        "largest_errors": [h.record() for h in largest_errors(heads)],
        "fidelity": None if result.fidelity is None else result.fidelity.record(),
        "warnings": list(warnings(result, manifest)),
    }


def warnings(result: Compaction, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Warnings about bad numbers in the receipt, each with what to type."""
    from amcli.pipeline.compaction.choices import HARMLESS, ROUNDING

    worst = result.rounding
    if worst is not None and not worst.error <= ROUNDING:
        changed = f"changes layer {worst.layer}'s output by {worst.error:.0%}"
        if not math.isfinite(worst.error):
            changed = f"cannot hold layer {worst.layer}"
        yield f"{worst.store} {changed}; try --store auto"
    less = _less(manifest["requested"])
    known = fit_errors(manifest).get("output")
    if known is not None and not known["mean"] <= HARMLESS:
        mean = f"{known['mean']:.2f}" if known["mean"] < 10 else error_text(known["mean"])
        yield f"output error {mean}: above {HARMLESS:g} answers change{less}"
    if huge := [head for head in facts(result) if head.is_lost]:
        head = max(huge, key=lambda head: head.worst)
        count = f"{len(huge):,} heads" if len(huge) > 1 else "a head"
        yield (
            f"{count} with an error of {HUGE} or more, {error_text(head.worst)} in layer "
            f"{head.layer}, head {head.head}: worse than no document{less}"
        )


def _less(requested: Mapping[str, Any]) -> str:
    """How to keep twice as much; empty if that would keep everything."""
    if "tokens" in requested:
        return f"; try --tokens {2 * int(requested['tokens'])}"
    ratio = float(requested.get("ratio", 1)) / 2
    return f"; try --ratio {ratio:.3g}" if ratio > 1 else ""


def lines(
    result: Compaction, manifest: Mapping[str, Any], seconds: Mapping[str, float], total: float
) -> Iterator[str]:
    """The receipt for people, in 80 columns; `seconds` of each stage, in order."""
    heads = facts(result)
    counts = [h.entries for h in heads]
    yield (
        f"{bytes_text(result.full_bytes)} → {bytes_text(result.stored_bytes)}, "
        f"{result.ratio:.1f}× smaller{in_all(result.ratio, result.whole_ratio)}, "
        f"in {seconds_text(total)}"
    )
    # A number and its unit stay on one line.
    stages = ", ".join(
        f"{name} {seconds_text(s)}".replace(" ", "\xa0") for name, s in seconds.items()
    )
    for line in wrap(stages, 80, initial_indent="  ", subsequent_indent="  "):
        yield line.replace("\xa0", " ")
    if counts:
        store = result.plan.store
        bits = "" if store in (NATIVE, MIXED) else f", each number in {store}"
        yield (
            f"{result.context.T:,} tokens are now {statistics.fmean(counts):,.0f} entries a head "
            f"({min(counts):,} to {max(counts):,}){bits}"
        )
        if store == MIXED:
            said = f"stored as {stores_text(list(result.plan.stores.values()))}"
            yield from wrap(said, 80, initial_indent="  ", subsequent_indent="  ")
    if result.fidelity is not None:
        reached = result.fidelity
        said = (
            f"fidelity {reached.agreement:.3f} at {result.ratio:.1f}×, the largest of "
            f"{len(reached.probes)} ratios tried with at least {reached.asked:g}: "
            f"{1 - reached.agreement:.1%} is lost of what the document adds to "
            f"{reached.tokens:,} held-out tokens"
        )
        yield from wrap(said, 80, subsequent_indent="  ")
    known = fit_errors(manifest)
    if known and result.errors is not None:
        means = ", ".join(
            f"{name} {error_text(known[name]['mean'])}" for name in sorted(known)[::-1]
        )
        yield f"error on {result.errors.count} held-out queries a head: {means} on average"
        yield from _table(heads)
    for warning in warnings(result, manifest):
        yield f"warning: {warning}"


def _table(heads: Sequence[HeadFacts]) -> Iterator[str]:
    """Two tables side by side."""
    gap = " " * 6
    heading = f"{'layer':>7} {'head':>5} {'entries':>8} {'output':>7} {'mass':>6}"
    yield f"  {'most entries':<{len(heading) - 2}}{gap}  largest errors"
    yield heading + gap + heading
    for left, right in zip_longest(most_entries(heads), largest_errors(heads)):
        yield _row(left) + (gap + _row(right) if right else "")


def _row(head: HeadFacts) -> str:
    return (
        f"{head.layer:>7} {head.head:>5} {head.entries:>8,} "
        f"{error_text(head.output_error):>7} {error_text(head.mass_error):>6}"
    )
