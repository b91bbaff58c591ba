"""The smallest compact context that still agrees with the full one: a search over ratios.

Agreement is the share of places in held-out text where compact and full context have the same
likeliest next token, teacher-forced. What is held out, and why, stands in `heldout`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from amcli.entries.ragged import Entries
from amcli.errors import UsageError
from amcli.matching import methods
from amcli.pipeline.compaction import heldout
from amcli.pipeline.compaction.compacting import Compaction, compact, measure, settled, shapes
from amcli.pipeline.compaction.options import Options, check
from amcli.pipeline.contexts.context import Context, shared
from amcli.pipeline.queries.passages import Passage
from amcli.pipeline.queries.passes import Passes
from amcli.system.progress import Progress, Silent

LARGEST = 400.0
"""The largest ratio that is tried."""

STEPS = 48
"""Ratios of the grid are LARGEST^(k / STEPS): 13% apart, and bisection tries six of them."""

PART = 128
"""Tokens of a held-out part."""

TOKENS = 4096
"""Document tokens that are asked for at most; of a longer document a seeded choice of parts."""

_LOGITS = {"cuda": 2**27}  # logits of one batch; elsewhere:
_LOGITS_CPU = 2**25


@dataclass(frozen=True)
class Probe:
    """One ratio that was tried: asked for, real, the bytes, and the agreement it gave."""

    ratio: float
    real_ratio: float
    stored_bytes: int
    agreement: float

    def record(self) -> dict[str, float | int]:
        """The probe as JSON."""
        return {
            "ratio": self.ratio,
            "real_ratio": round(self.real_ratio, 4),
            "stored_bytes": self.stored_bytes,
            "agreement": round(self.agreement, 6),
        }


@dataclass(frozen=True)
class Reached:
    """What a search was asked for and found: agreement on so many held-out tokens."""

    asked: float
    agreement: float
    tokens: int
    probes: tuple[Probe, ...]

    def record(self) -> dict[str, Any]:
        """The search as JSON, for manifests and `--json`."""
        return {
            "asked": self.asked,
            "agreement": round(self.agreement, 6),
            "tokens": self.tokens,
            "probes": [probe.record() for probe in self.probes],
        }


def require(fidelity: float, options: Options) -> None:
    """Raises UsageError for an agreement that cannot be, and for options that exclude it."""
    if not 0 < fidelity <= 1:
        raise UsageError(
            f"--fidelity {fidelity:g} is not a share: above 0, and at most 1",
            "for example --fidelity 0.99",
        )
    for name, value in (("--ratio", options.ratio), ("--tokens", options.tokens)):
        if value is not None:
            raise UsageError(f"--fidelity and {name} exclude each other", "give one of them")
    if methods.get(options.method).selection == "all":
        raise UsageError(
            f"method {options.method!r} keeps every key: there is nothing to search for",
            "leave --fidelity out, or choose another method",
        )


def search(
    context: Context,
    options: Options,
    fidelity: float,
    *,
    progress: Progress | None = None,
) -> Compaction:
    """The compaction at the largest ratio of a grid whose agreement is at least `fidelity`.

    Bisection from 20× on; which ratios are tried next depends on nothing but the answers, so
    that a higher fidelity never ends at a larger ratio. The reference pass is run once, and the
    order in which a ratio selected a head's keys serves the larger ratios after it. Its
    `fidelity` says what was tried; its `seconds` are those of the whole search.

    Raises UsageError when no ratio tried reaches it, with the best that was seen, and as
    `compact`.
    """
    progress = progress or Silent()
    require(fidelity, options)
    method = check(options, context.T)
    passes = Passes(context, shared=False, search=True)
    options = settled(context, method, options, passes, progress)
    judge = Judge(context, held_out(context, options.seed), progress)
    grid = ratios(context, options.storage(method), method.has_beta, options.positions)
    found: Compaction | None = None
    probes: list[Probe] = []
    reference: dict[str, dict[str, float]] = {}  # stages before `compact`, by source of queries
    compacting = 0.0
    low, high = -1, len(grid)  # the largest that is good, the smallest that is not
    while high - low > 1:
        middle = (low + high) // 2
        stages = _Stages(progress, grid[middle], probes)
        asked = replace(options, ratio=grid[middle])
        tried = compact(context, asked, progress=stages, passes=passes, errors=False)
        agreement = judge.agreement(tried.layers, stages)
        probes.append(Probe(grid[middle], tried.ratio, tried.stored_bytes, agreement))
        compacting += tried.seconds.pop("compact")
        reference[tried.options.source(method)] = tried.seconds
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
    """Seconds of each stage, once: those of a mixture hold those of the source it was before."""
    total: dict[str, float] = {}
    for seconds in stages:
        for name, value in seconds.items():
            total[name] = max(total.get(name, 0.0), value)
    return total


def ratios(context: Context, store: str, beta: bool, positions: bool = False) -> list[float]:
    """The grid, from 1 on, in three digits; as far as every head is left an entry."""
    layers = shapes(context, store, positions)
    heads = sum(layer.heads for layer in layers)
    grid = [float(f"{LARGEST ** (k / STEPS):.3g}") for k in range(STEPS + 1)]
    cost = max((layer.entry_bytes(beta) for layer in layers), default=1)
    room = sum(layer.full_bytes for layer in layers)
    return [r for r in grid if r == 1 or (r <= context.T and room / r >= heads * cost)]


def held_out(context: Context, seed: int) -> list[Passage]:
    """Parts of the document to be said again; UsageError where the model's positions end."""
    parts = heldout.parts(context, PART, max(1, TOKENS // PART), seed)
    if not parts:
        raise UsageError(
            f"the model's {context.loaded.geometry.max_positions:,} positions leave no room to "
            f"measure an agreement behind a context of {context.T:,} tokens",
            "shorten the document, or give a --ratio",
        )
    return parts


class Judge:
    """Knows what the full context predicts in held-out text, and compares others with it.

    Token `i` of a passage is predicted from those before it, for all `i >= first`.

    tokens  predictions that are compared; seconds: spent so far
    """

    def __init__(self, context: Context, passages: Sequence[Passage], progress: Progress) -> None:
        self.context = context
        self.passages = passages
        self.tokens = sum(len(p.ids) - p.first for p in passages)
        self.seconds = 0.0
        self._truth = self._likeliest(None, progress)  # [tokens]

    def agreement(self, layers: Sequence[Entries], progress: Progress | None = None) -> float:
        """Share of the predictions in which these entries agree with the full context."""
        mine = self._likeliest(layers, progress or Silent())
        return int((mine == self._truth).sum()) / max(1, self.tokens)

    @torch.no_grad()
    def _likeliest(self, layers: Sequence[Entries] | None, progress: Progress) -> torch.Tensor:
        """`[tokens]` int64: the likeliest token at each compared place."""
        began = time.perf_counter()
        loaded = self.context.loaded
        model: Any = loaded.model
        cache = shared(self.context, layers)
        progress.start("measure", self.tokens)
        found = []
        for batch in self._batches():
            columns = max(len(p.ids) for p in batch) - 1  # a last token is only predicted
            rows = [(p.ids[:-1] + [0] * columns)[:columns] for p in batch]
            ids = torch.tensor(rows, device=loaded.device)
            fork = cache.fork(len(batch))
            logits = model(input_ids=ids, past_key_values=fork, use_cache=True).logits
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
    """A `Progress` that puts the ratio being tried, and what the last one gave, before a stage."""

    def __init__(self, progress: Progress, ratio: float, probes: Sequence[Probe]) -> None:
        self._progress = progress
        last = f" ({probes[-1].ratio:g}×: {probes[-1].agreement:.3f})" if probes else ""
        self._at = f"{ratio:g}×{last}"

    def start(self, stage: str, total: int) -> None:
        """A new stage of this probe."""
        self._progress.start(f"{self._at} {stage}", total)

    def advance(self, units: int = 1) -> None:
        """Some units of it are done."""
        self._progress.advance(units)


def _too_high(fidelity: float, probes: Sequence[Probe]) -> UsageError:
    best = max(probes, key=lambda probe: (probe.agreement, probe.ratio))
    less = int(best.agreement * 1000) / 1000
    ask = f"ask for less, such as --fidelity {less:g}, or " if less else ""
    return UsageError(
        f"no ratio reaches an agreement of {fidelity:g}: the best seen is "
        f"{best.agreement:.4f}, at {best.ratio:g}×",
        f"{ask}keep everything with --method keep",
    )
