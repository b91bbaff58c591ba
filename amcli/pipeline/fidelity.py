"""The smallest compact context that still agrees with the full one: a search over ratios.

Agreement is measured on tokens of the document that the model is made to say again, as the share
of them where compact and full context have the same likeliest next token. For the measure to
mean something, the text must not be what the entries were fitted to. But a document's facts
cannot be held out: scores and fits that never saw a fact would lose it, so that the number would
be far below what a user gets. What is held out is the way of asking for them. The reference pass
says the document in parts as long as it can, each token after all of its predecessors; here it is
said in short parts that begin anywhere, so that the model has to find each place again by the
compact keys alone, from another question, at other positions, and with little of its own text to
lean on. On the model in the box that is the harder task at every ratio (docs/methods.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from amcli.errors import UsageError
from amcli.matching import methods
from amcli.models.cache import CompactCache
from amcli.pipeline.compaction import Compaction, Options, check, compact, shapes
from amcli.pipeline.contexts import Context, dense, full_layers
from amcli.pipeline.progress import Progress, Silent
from amcli.pipeline.reference import Passes
from amcli.prompts import REPEAT_FROM
from amcli.quantize import Entries

LARGEST = 400.0
"""The largest ratio that is tried."""

STEPS = 48
"""Ratios of the grid are LARGEST^(k / STEPS): 13% apart, and bisection tries six of them."""

PART = 128
"""Tokens of a held-out part."""

TOKENS = 4096
"""Document tokens that are asked for at most; of a longer document a seeded choice of parts."""

_HEAD = 12  # tokens that the instruction quotes: the document is not needed to say them
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


@dataclass(frozen=True)
class Part:
    """Tokens fed after the context; what follows each of `ids[first - 1 : -1]` is predicted."""

    ids: list[int]
    first: int

    @property
    def count(self) -> int:
        """Predictions that are compared."""
        return len(self.ids) - self.first


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
    that a higher fidelity never ends at a larger ratio. The reference pass is run once. Its
    `fidelity` says what was tried; its `seconds` are those of the whole search.

    Raises UsageError when no ratio tried reaches it, with the best that was seen, and as
    `compact`.
    """
    progress = progress or Silent()
    require(fidelity, options)
    method = check(options, context.T)
    judge = Judge(context, held_out(context, options.seed), progress)
    grid = ratios(context, options.store, beta=method.has_beta)
    passes = Passes(context, shared=False)
    found: Compaction | None = None
    probes: list[Probe] = []
    seconds = {"reference": 0.0, "compact": 0.0, "agreement": judge.seconds}
    low, high = -1, len(grid)  # the largest that is good, the smallest that is not
    while high - low > 1:
        middle = (low + high) // 2
        stages = _Stages(progress, grid[middle], probes)
        tried = compact(
            context, replace(options, ratio=grid[middle]), progress=stages, passes=passes
        )
        agreement = judge.agreement(tried.layers, stages)
        probes.append(Probe(grid[middle], tried.ratio, tried.stored_bytes, agreement))
        seconds["reference"] = tried.seconds["reference"]
        seconds["compact"] += tried.seconds["compact"]
        if agreement >= fidelity:
            low, found = middle, tried
        else:
            high = middle
    seconds["agreement"] = judge.seconds
    if found is None:
        raise _too_high(fidelity, probes)
    reached = next(probe for probe in probes if probe.ratio == grid[low])
    found.fidelity = Reached(fidelity, reached.agreement, judge.tokens, tuple(probes))
    found.seconds = {**found.seconds, **seconds}
    return found


def ratios(context: Context, store: str, beta: bool) -> list[float]:
    """The grid, from 1 on, in three digits; as far as every head is left an entry."""
    layers = shapes(context, store)
    heads = sum(layer.heads for layer in layers)
    grid = [float(f"{LARGEST ** (k / STEPS):.3g}") for k in range(STEPS + 1)]
    cost = max((layer.entry_bytes(beta) for layer in layers), default=1)
    room = sum(layer.full_bytes for layer in layers)
    return [r for r in grid if r == 1 or (r <= context.T and room / r >= heads * cost)]


def held_out(context: Context, seed: int) -> list[Part]:
    """The document in parts of PART tokens that begin at a seeded place, each after its question.

    The tail of the part before the first one is left out, as is a last part too short to say
    anything, unless there is no other. Raises UsageError where the model's positions end.
    """
    document = context.ids[context.document_start : context.document_end]
    chat, tokenizer = context.loaded.chat, context.loaded.tokenizer
    generator = torch.Generator().manual_seed(seed)
    # From a quarter to three quarters of a part: where reference passages begin is not close.
    offset = PART // 4 + int(torch.randint(PART // 2, (1,), generator=generator))
    if len(document) < offset + PART // 2:
        offset = 0
    starts = list(range(offset, max(offset + 1, len(document) - PART // 4), PART))
    order = torch.randperm(len(starts), generator=generator).tolist()
    chosen = sorted(order[: max(1, TOKENS // PART)])
    parts = []
    for start in (starts[i] for i in chosen):
        piece = document[start : start + PART]
        quoted = min(_HEAD, len(piece) // 2)
        head = str(tokenizer.decode(piece[:quoted], skip_special_tokens=True)).strip()
        lead = chat.first_turn(REPEAT_FROM.format(start=head))
        parts.append(Part(lead + piece, len(lead) + quoted))
    limit = context.loaded.geometry.max_positions
    longest = max(len(part.ids) for part in parts)
    if limit is not None and context.T + longest > limit:
        raise UsageError(
            f"the model's {limit:,} positions leave no room to measure an agreement behind a "
            f"context of {context.T:,} tokens",
            "shorten the document, or give a --ratio",
        )
    return parts


class Judge:
    """Knows what the full context predicts on held-out parts, and compares others with it.

    seconds  spent so far; tokens: predictions that are compared
    """

    def __init__(self, context: Context, parts: Sequence[Part], progress: Progress) -> None:
        self.context = context
        self.parts = parts
        self.tokens = sum(part.count for part in parts)
        self.seconds = 0.0
        self._truth = self._likeliest(None, progress)  # [tokens]

    def agreement(self, layers: Sequence[Entries], progress: Progress | None = None) -> float:
        """Share of the predictions in which entries of these layers agree with the full context."""
        mine = self._likeliest(layers, progress or Silent())
        return int((mine == self._truth).sum()) / max(1, self.tokens)

    @torch.no_grad()
    def _likeliest(self, layers: Sequence[Entries] | None, progress: Progress) -> torch.Tensor:
        """`[tokens]` int64: the likeliest token at each compared place."""
        began = time.perf_counter()
        loaded = self.context.loaded
        model: Any = loaded.model
        cache = _cache(self.context, layers)
        progress.start("agreement", self.tokens)
        found = []
        for batch in self._batches():
            columns = max(len(part.ids) for part in batch) - 1  # the last one is only predicted
            rows = [(part.ids[:-1] + [0] * columns)[:columns] for part in batch]
            fork = cache.fork(len(batch))
            logits = model(
                input_ids=torch.tensor(rows, device=loaded.device),
                past_key_values=fork,
                use_cache=True,
            ).logits  # [B, columns, V]
            fork.require_attended()
            top = logits.argmax(-1)
            for row, part in enumerate(batch):
                found.append(top[row, part.first - 1 : len(part.ids) - 1].cpu())
                progress.advance(part.count)
        self.seconds += time.perf_counter() - began
        return torch.cat(found)

    def _batches(self) -> list[list[Part]]:
        """Parts that go through the model together, padded on the right."""
        config = self.context.loaded.model.config.get_text_config(decoder=True)
        longest = max(len(part.ids) for part in self.parts)
        limit = _LOGITS.get(self.context.loaded.device.type, _LOGITS_CPU)
        size = max(1, limit // (longest * int(config.vocab_size)))
        return [list(self.parts[i : i + size]) for i in range(0, len(self.parts), size)]


class _Stages:
    """A `Progress` that puts the ratio being tried, and what the last one gave, before a stage."""

    def __init__(self, progress: Progress, ratio: float, probes: Sequence[Probe]) -> None:
        self._progress = progress
        last = f", {probes[-1].ratio:g}×: {probes[-1].agreement:.3f}" if probes else ""
        self._at = f"{ratio:g}×{last}"

    def start(self, stage: str, total: int) -> None:
        """A new stage of this probe."""
        self._progress.start(f"{self._at} {stage}", total)

    def advance(self, units: int = 1) -> None:
        """Some units of it are done."""
        self._progress.advance(units)


def _cache(context: Context, layers: Sequence[Entries] | None) -> CompactCache:
    """The entries of full layers as a prefix that a batch shares; the full context when None."""
    cache = context.cache.fork()
    for i in full_layers(context):
        cache.set_prefix(i, dense(context.cache, i) if layers is None else layers[i], context.T)
    return cache


def _too_high(fidelity: float, probes: Sequence[Probe]) -> UsageError:
    best = max(probes, key=lambda probe: (probe.agreement, probe.ratio))
    less = int(best.agreement * 1000) / 1000
    return UsageError(
        f"no ratio reaches an agreement of {fidelity:g}: the best seen is "
        f"{best.agreement:.4f}, at {best.ratio:g}×",
        f"ask for less, such as --fidelity {less:g}, or keep everything with --method keep",
    )
