"""The smallest compact context that still agrees with the full one: a search over ratios.

Agreement is the share of places in held-out text where the compact and the full context predict
the same likeliest next token, teacher-forced. `heldout` says what is held out, and why.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from amcli.entries.ragged import Entries
from amcli.errors import UsageError
from amcli.matching import methods
from amcli.models.calling import run
from amcli.pipeline.compaction import heldout
from amcli.pipeline.compaction.compacting import carry_out, measure, planned
from amcli.pipeline.compaction.plan import Plan
from amcli.pipeline.compaction.request import Request, check
from amcli.pipeline.compaction.result import Compaction, Probe, Reached
from amcli.pipeline.contexts.context import Context, require_finite, shared
from amcli.pipeline.queries.passages import Passage
from amcli.pipeline.queries.passes import Passes
from amcli.system.progress import SILENT, Progress

LARGEST = 400.0
"""The largest ratio that is tried."""

STEPS = 48
"""Ratios of the grid are LARGEST^(k / STEPS): 13% apart, and bisection tries six of them."""

PART = 128
"""Tokens of a held-out part."""

TOKENS = 4096
"""Most document tokens that are asked for; of a longer document, a seeded choice of parts."""

_LOGITS = {"cuda": 2**27}  # logits in one batch; other devices:
_LOGITS_CPU = 2**25


def require(fidelity: float, request: Request) -> None:
    """Raises UsageError for an impossible agreement, and for options that rule out a search."""
    if not 0 < fidelity <= 1:
        raise UsageError(
            f"a fidelity of {fidelity:g} is not a share: above 0, and at most 1",
            "for example 0.99",
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
    if methods.get(request.method).selection == "all":
        raise UsageError(
            f"method {request.method!r} keeps every key: there is nothing to search for",
            "leave the fidelity out, or choose another method",
            code="nothing-to-search",
            field="fidelity",
        )


def search(
    context: Context,
    request: Request,
    fidelity: float,
    *,
    progress: Progress = SILENT,
) -> Compaction:
    """The compaction at the largest ratio of the grid whose agreement is at least `fidelity`.

    Bisection, starting at 20×; the next ratio depends only on the outcomes so far, so a higher
    fidelity never ends at a larger ratio. The reference pass runs once, and the order in which
    one ratio selected a head's keys serves the larger ratios after it. What rounding does to each
    layer is measured once too, so that stores differ only where ratios leave room for every key.
    The compaction's `fidelity` says what was tried; its `seconds` cover the whole search.

    Raises UsageError when no ratio tried reaches `fidelity`, with the best seen, and whatever
    `compact` raises.
    """
    require(fidelity, request)
    check(request, context.T)
    require_finite(context)
    passes = Passes(context, shared=False, search=True)
    judge = Judge(context, held_out(context, request.seed), progress)
    grid = ratios(planned(context, request, passes, progress))
    found: Compaction | None = None
    probes: list[Probe] = []
    reference: dict[str, dict[str, float]] = {}  # stages before `compact`, by query source
    compacting = 0.0
    low, high = -1, len(grid)  # indices: the last good ratio, the first bad one
    while high - low > 1:
        middle = (low + high) // 2
        stages = _Stages(progress, grid[middle], probes)
        plan = planned(context, replace(request, ratio=grid[middle]), passes, stages)
        tried = carry_out(context, plan, passes, progress=stages)
        agreement = judge.agreement(tried.layers, stages)
        probes.append(Probe(grid[middle], tried.ratio, tried.stored_bytes, agreement))
        compacting += tried.seconds.pop("compact")
        reference[plan.queries.name] = tried.seconds
        if agreement >= fidelity:
            low, found = middle, tried
        else:
            high = middle
    if found is None:
        raise _too_high(fidelity, probes)
    reached = next(probe for probe in probes if probe.ratio == grid[low])
    found.fidelity = Reached(fidelity, reached.agreement, judge.tokens, tuple(probes))
    found.seconds = {**_of_all(reference.values()), "compact": compacting}
    found.seconds["agreement"] = judge.seconds
    measure(found, passes, progress)
    return found


def _of_all(stages: Iterable[dict[str, float]]) -> dict[str, float]:
    """Seconds of each stage, counted once: a mixture's include those of its sources tried alone."""
    total: dict[str, float] = {}
    for seconds in stages:
        for name, value in seconds.items():
            total[name] = max(total.get(name, 0.0), value)
    return total


def ratios(plan: Plan) -> list[float]:
    """The grid from 1 up, to three digits, as far as every head keeps an entry."""
    layers = plan.shapes
    heads = sum(layer.heads for layer in layers)
    grid = [float(f"{LARGEST ** (k / STEPS):.3g}") for k in range(STEPS + 1)]
    costs = [layer.stored_bytes([1], plan.method.has_beta) for layer in layers]
    cost, room = max(costs, default=1), sum(layer.full_bytes for layer in layers)
    return [r for r in grid if r == 1 or (r <= plan.target.T and room / r >= heads * cost)]


def held_out(context: Context, seed: int) -> list[Passage]:
    """Parts of the document to repeat; UsageError where the model has no positions left."""
    parts = heldout.parts(context, PART, max(1, TOKENS // PART), seed)
    if not parts:
        raise UsageError(
            f"the model's {context.loaded.geometry.max_positions:,} positions leave no room to "
            f"measure an agreement behind a context of {context.T:,} tokens",
            "shorten the document, or give a ratio",
            code="no-room-to-measure",
            field="fidelity",
            positions=context.loaded.geometry.max_positions,
            tokens=context.T,
        )
    return parts


class Judge:
    """Knows what the full context predicts in held-out text, and compares other entries with it.

    Token `i` of a passage is predicted from the tokens before it, for all `i >= first`.

    tokens   predictions compared
    seconds  spent so far
    """

    def __init__(self, context: Context, passages: Sequence[Passage], progress: Progress) -> None:
        self.context = context
        self.passages = passages
        self.tokens = sum(len(p.ids) - p.first for p in passages)
        self.seconds = 0.0
        self._truth = self._likeliest(None, progress)  # [tokens]

    def agreement(self, layers: Sequence[Entries], progress: Progress = SILENT) -> float:
        """Share of predictions in which these entries agree with the full context."""
        mine = self._likeliest(layers, progress)
        return int((mine == self._truth).sum()) / max(1, self.tokens)

    @torch.no_grad()
    def _likeliest(self, layers: Sequence[Entries] | None, progress: Progress) -> torch.Tensor:
        """`[tokens]` int64: the likeliest token at each compared place."""
        began = time.perf_counter()
        loaded = self.context.loaded
        model = loaded.model
        cache = shared(self.context, layers)
        progress.start("measure", self.tokens)
        found = []
        for batch in self._batches():
            columns = max(len(p.ids) for p in batch) - 1  # the last token is predicted, not fed
            rows = [(p.ids[:-1] + [0] * columns)[:columns] for p in batch]
            ids = torch.tensor(rows, device=loaded.device)
            fork = cache.fork(len(batch))
            logits = run(model, fork, ids).logits
            fork.require_attended()
            top = logits.argmax(-1)  # [B, columns]
            for row, p in enumerate(batch):
                found.append(top[row, p.first - 1 : len(p.ids) - 1].cpu())
                progress.advance(len(p.ids) - p.first)
        self.seconds += time.perf_counter() - began
        return torch.cat(found)

    def _batches(self) -> list[list[Passage]]:
        """Passages that go through the model together, padded on the right."""
        config = self.context.loaded.model.config.get_text_config(decoder=True)
        longest = max(len(p.ids) for p in self.passages)
        limit = _LOGITS.get(self.context.loaded.device.type, _LOGITS_CPU)
        size = max(1, limit // (longest * int(config.vocab_size)))
        return [list(self.passages[i : i + size]) for i in range(0, len(self.passages), size)]


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
        f"no ratio reaches an agreement of {fidelity:g}: the best seen is "
        f"{best.agreement:.4f}, at {best.ratio:g}×",
        f"{ask}keep everything with the method keep",
        code="fidelity-not-reached" if less else "no-agreement",
        field="fidelity",
        less=less,
    )
