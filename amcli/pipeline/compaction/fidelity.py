"""The smallest compact context that loses little enough of the full one: a search over ratios.

Loss is measured on quotes, as `queries.quotes` makes them, by a seed that no fit uses: what the
full context's predictions of their answers lose, KL(full ‖ compact), as a share of what they lose
without the document. Fidelity is one minus that share. The loss of quotes foretells that of answers
better than repeated text does, and about as large as it comes out (docs/methods.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from amcli.entries.ragged import Entries
from amcli.errors import UsageError
from amcli.models.cache import CompactCache
from amcli.pipeline.compaction.carrying import carry_out, planned
from amcli.pipeline.compaction.defaults import DEFAULT_RATIO
from amcli.pipeline.compaction.plan import Plan
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction, Probe, Reached
from amcli.pipeline.contexts.context import Context, shared
from amcli.pipeline.contexts.forcing import Forced, Limits, Teacher, answered
from amcli.pipeline.contexts.reading import emptied
from amcli.pipeline.queries.passes import Passes
from amcli.pipeline.queries.quotes import exchanges
from amcli.pipeline.queries.self_study import Exchange
from amcli.system.clock import stopwatch
from amcli.system.progress import SILENT, Progress

LARGEST = 400.0
"""The largest ratio that is tried."""

STEPS = 48
"""Ratios of the grid are LARGEST^(k / STEPS): 13% apart, and bisection tries six of them."""

QUOTES = 64
"""Most quotes that are asked for: other ones would say a loss that is a seventh to a quarter of
itself larger or smaller, about what a step of the grid changes."""

SEED, ROUNDS = 7919, 4
"""Added to the request's seed, from which the quotes of a fit come; for a document that has too few
quotes at a time, again, up to so often."""

LEAST = 1e-4
"""Nats per token that the document has to contribute for a share of them to mean anything."""

BATCH = 2048
"""Tokens read at a time: the full context's predictions are kept in pieces of that many."""

KEPT = 2**31
"""Bytes of them that are kept; what is beyond is computed again for every ratio."""


def search(
    context: Context, request: Request, passes: Passes, *, progress: Progress = SILENT
) -> Compaction:
    """The compaction at the largest ratio of the grid whose fidelity is at least that asked for.

    Bisection, starting at 20×; the next ratio depends only on the outcomes so far, so a higher
    fidelity never ends at a larger ratio. The reference pass runs once, and the order in which
    one ratio selected a head's keys serves the larger ratios after it, if `passes` say that a
    search follows. What rounding does to each layer is measured once too, so that stores differ
    only where ratios leave room for every key. The compaction's `fidelity` says what was tried; its
    `seconds` cover the whole search.

    Raises UsageError when no ratio tried reaches the fidelity, with the best seen; when there is
    nothing to measure it by; and whatever `compact` raises.
    """
    fidelity = request.share
    if fidelity is None:
        raise ValueError("no fidelity was asked for")
    judge = Judge(context, held_out(context, request.seed), progress)
    grid = ratios(planned(context, beginning(request, context.T), passes, progress))
    found: Compaction | None = None
    probes: list[Probe] = []
    reference: dict[str, dict[str, float]] = {}  # stages before `compact`, by query source
    compacting = 0.0
    low, high = -1, len(grid)  # indices: the last good ratio, the first bad one
    while high - low > 1:
        middle = (low + high) // 2
        stages = _Stages(progress, grid[middle], probes)
        plan = planned(context, at(request, grid[middle]), passes, stages)
        tried = carry_out(context, plan, passes, progress=stages)
        reached = judge.fidelity(tried.layers, stages)
        probes.append(Probe(grid[middle], tried.ratio, tried.stored_bytes, reached))
        compacting += tried.seconds.pop("compact")
        reference[plan.queries.name] = tried.seconds
        if reached >= fidelity:
            low, found = middle, tried
        else:
            high = middle
    if found is None:
        raise _too_high(fidelity, probes)
    best = next(probe for probe in probes if probe.ratio == grid[low])
    found.fidelity = Reached(fidelity, best.agreement, judge.tokens, tuple(probes))
    found.seconds = {**_of_all(reference.values()), "compact": compacting}
    found.seconds["agreement"] = judge.seconds
    return found


def _of_all(stages: Iterable[dict[str, float]]) -> dict[str, float]:
    """Seconds of each stage, counted once: a mixture's include those of its sources tried alone."""
    total: dict[str, float] = {}
    for seconds in stages:
        for name, value in seconds.items():
            total[name] = max(total.get(name, 0.0), value)
    return total


def at(request: Request, ratio: float) -> Request:
    """The same request at a ratio of its own."""
    return replace(request, ratio=ratio, fidelity=None)


def beginning(request: Request, T: int) -> Request:
    """The same request at about the ratio that a search begins with: one that a context of `T`
    tokens, however short, has room for."""
    return at(request, min(DEFAULT_RATIO, max(1.0, T / 4)))


def ratios(plan: Plan) -> list[float]:
    """The grid from 1 up, to three digits, as far as every head keeps an entry."""
    layers = plan.shapes
    heads = sum(layer.heads for layer in layers)
    grid = [float(f"{LARGEST ** (k / STEPS):.3g}") for k in range(STEPS + 1)]
    costs = [layer.stored_bytes([1], plan.method.has_beta) for layer in layers]
    cost, room = max(costs, default=1), sum(layer.full_bytes for layer in layers)
    return [r for r in grid if r == 1 or (r <= plan.target.T and room / r >= heads * cost)]


def held_out(context: Context, seed: int) -> list[Forced]:
    """Quotes of the document as questions with their answers, which no fit with that seed has seen.

    Raises UsageError where there are none, or no positions for any.
    """
    loaded, limit = context.loaded, context.loaded.geometry.max_positions
    fitted = {x.question for x in exchanges(context, seed)}  # chance makes some of them again
    made: dict[str, Exchange] = {}
    for k in range(1, ROUNDS + 1):
        if len(made) < QUOTES:
            made |= {
                x.question: x
                for x in exchanges(context, seed + k * SEED)
                if x.question not in fitted | made.keys()
            }
    if not made:
        raise UsageError(
            "the document is too short: no quotes of it are left to measure a fidelity by",
            "give a ratio",
            code="nothing-to-quote",
            field="fidelity",
        )
    found = [answered(loaded, context.lead(x.question), x.answer) for x in made.values()][:QUOTES]
    found = [x for x in found if limit is None or context.T + x.length <= limit]
    if not found:
        raise UsageError(
            f"the model's {limit:,} positions leave no room to measure a fidelity behind a "
            f"context of {context.T:,} tokens",
            "shorten the document, or give a ratio",
            code="no-room-to-measure",
            field="fidelity",
            positions=limit,
            tokens=context.T,
        )
    return found


class Judge:
    """Knows what the full context predicts in answers, and what of it other entries lose.

    tokens   predictions compared
    none     nats that all of them together lose without the document
    seconds  spent so far

    Raises UsageError where the document makes no difference to the answers.
    """

    def __init__(self, context: Context, questions: Sequence[Forced], progress: Progress) -> None:
        self.context = context
        self.tokens = sum(len(q.targets) for q in questions)
        self.seconds = 0.0
        loaded, full = context.loaded, shared(context)
        limits = replace(Limits.of(loaded.device), tokens=BATCH, kept=KEPT)
        self._teacher = Teacher(loaded, questions, full, limits)
        self._lost(full, progress)  # and keeps what it predicts
        self._teacher.settle()
        self.none = self._lost(shared(emptied(context)), progress)
        if not self.none > LEAST * self.tokens:
            raise UsageError(
                "the model says the same about the document without having read it: there is "
                "nothing to lose",
                "give a ratio, or another model",
                code="nothing-to-lose",
                field="fidelity",
            )

    def fidelity(self, layers: Sequence[Entries], progress: Progress = SILENT) -> float:
        """One minus the share that these entries lose: at most 1, and 0 where they lose all, or
        where the model computes no numbers. To six digits, as it is recorded."""
        kept = 1 - self._lost(shared(self.context, layers), progress) / self.none
        return round(max(0.0, kept), 6) if math.isfinite(kept) else 0.0

    def _lost(self, cache: CompactCache, progress: Progress) -> float:
        """KL(full context ‖ another) of all predictions, in nats."""
        device = self.context.loaded.device
        began = stopwatch(device)
        progress.start("measure", 0)
        lost = sum(outcome.kl for outcome in self._teacher.measure(cache))
        self.seconds += stopwatch(device) - began
        return lost


class _Stages:
    """A `Progress` that prefixes each stage with the ratio being tried and the last result."""

    def __init__(self, progress: Progress, ratio: float, probes: Sequence[Probe]) -> None:
        self._progress = progress
        last = f" ({probes[-1].ratio:g}×: {probes[-1].agreement:.3f})" if probes else ""
        self._at = f"{ratio:g}×{last}"

    def start(self, stage: str, total: int) -> None:
        """Begins a stage of this probe."""
        self._progress.start(f"{self._at} {stage}", total)

    def advance(self, units: int = 1) -> None:
        """Counts units of the stage as done."""
        self._progress.advance(units)


def _too_high(fidelity: float, probes: Sequence[Probe]) -> UsageError:
    best = max(probes, key=lambda probe: (probe.agreement, probe.ratio))
    less = int(best.agreement * 1000) / 1000
    ask = f"ask for less, such as {less:g}, or " if less else ""
    return UsageError(
        f"no ratio reaches a fidelity of {fidelity:g}: the best seen is "
        f"{best.agreement:.4f}, at {best.ratio:g}×",
        f"{ask}keep everything with the method keep",
        code="fidelity-not-reached" if less else "no-agreement",
        field="fidelity",
        less=less,
    )
