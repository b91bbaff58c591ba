"""Contexts to measure: full, none, compacted by a method, and two made in other ways.

Every context is prepared for batches: entries of full layers are a prefix that all rows share, so
that a hundred questions cost the memory of one document.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from amcli.entries.catalogue import NATIVE
from amcli.entries.matrix import Numbers
from amcli.entries.ragged import Entries
from amcli.entries.stores import quantizer_of
from amcli.evaluation.catalogue import ALL
from amcli.matching import methods
from amcli.models.cache import CompactCache
from amcli.models.generate import stream
from amcli.models.loading import LoadedModel
from amcli.models.spoken import Spoken, whole_text
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.defaults import AUTO
from amcli.pipeline.compaction.plan import Target
from amcli.pipeline.compaction.request import Request, check
from amcli.pipeline.contexts import reading
from amcli.pipeline.contexts.context import Context, dense, full_layers, shared
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries.passes import Passes
from amcli.storage.summary import fit_errors
from amcli.system.clock import stopwatch
from amcli.system.progress import Progress

FULL, NONE = "full", "none"
"""The two anchors: the whole document, and an empty one."""


@dataclass(frozen=True)
class Made:
    """A context ready for questions.

    stored_bytes, full_bytes  bytes of the layers that can be compacted, biases included
    budget                    how heads shared the entries, if there was a choice
    seconds                   time for the `reference` pass and for `compact`
    output_error              output error on held-out queries, mean over heads; None: unknown
    """

    cache: CompactCache
    stored_bytes: int
    full_bytes: int
    budget: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    output_error: float | None = None

    @property
    def ratio(self) -> float | None:
        """Full over stored bytes; None if nothing is stored."""
        return self.full_bytes / self.stored_bytes if self.stored_bytes else None


def whole(context: Context) -> Made:
    """The document, uncompacted."""
    size = Target.of(context).full_bytes
    return Made(shared(context), size, size)


def nothing(loaded: LoadedModel, full_bytes: int) -> Made:
    """An empty document: shows what the model knows by itself, or guesses."""
    context = reading.prefill(loaded, Source("nothing", ""))
    return Made(shared(context), 0, full_bytes)


# ---- compacted -------------------------------------------------------------------------------


def compacted(
    context: Context, request: Request, passes: Passes, progress: Progress
) -> tuple[Made, list[Entries]]:
    """A context compacted by a registered method, and its layers.

    `passes` are this context's reference passes, so that each runs once for all methods.
    """
    stopwatch(context.loaded.device)  # unfinished work would be counted as this method's
    found = compact(context, request, progress=progress, passes=passes)
    seconds = {name: spent for name, spent in found.seconds.items() if name != "errors"}
    errors = fit_errors(found.errors.record()) if found.errors else {}
    made = Made(
        shared(context, found.layers),
        found.stored_bytes,
        found.full_bytes,
        found.plan.budget,
        seconds,
        errors.get("output", {}).get("mean"),
    )
    return made, found.layers


# ---- what is no method -----------------------------------------------------------------------

SUMMARIZE = (
    "Summarize the text above in at most {words} words. Keep as many of its facts, names and "
    "numbers as fit. Write the summary only."
)


def summary(context: Context, request: Request, passes: Passes, progress: Progress) -> Made:
    """The model's own summary in place of the document, cut to the same stored bytes.

    The model is told how long the summary may be, writes it greedily, and reads it just as it read
    the document; whole tokens that do not fit are cut from its end.
    """
    loaded = context.loaded
    began = stopwatch(loaded.device)
    target = Target.of(context)
    store = NATIVE if request.store in (None, AUTO) else str(request.store)
    shapes, afforded = target.shapes(store), target.full_bytes / float(request.ratio or 1)

    def cost(tokens: int) -> int:  # no biases
        return sum(x.stored_bytes([tokens] * x.heads, beta=False) for x in shapes)

    tokens = bisect_right(range(1, context.T + 1), afforded, key=cost)
    opening = len(loaded.chat.open_document("").ids)
    room = max(0, tokens - opening)
    asked = loaded.chat.first_turn(SUMMARIZE.format(words=max(1, room * 3 // 4)))
    limit = loaded.geometry.max_positions
    if limit is not None:
        room = min(room, limit - context.T - len(asked))
    ids: list[int] = []
    if room > 0:
        progress.start("summary", room)
        spoken = Spoken(loaded.tokenizer, loaded.chat)
        for token in stream(loaded, context.cache.fork(), asked, max_tokens=room):
            spoken.push(token)
            progress.advance()
            if spoken.ended:
                break
        ids = spoken.tokens[: spoken.kept()[0]]
    text = _that_fits(loaded, ids, tokens)
    brief = reading.prefill(loaded, Source("summary", text))
    layers = _stored(brief, store)
    stored = sum(layers[i].nbytes for i in full_layers(brief))
    seconds = {"reference": 0.0, "compact": stopwatch(loaded.device) - began}
    return Made(shared(brief, layers), stored, target.full_bytes, "uniform", seconds)


def _stored(context: Context, store: str) -> list[Entries]:
    """All entries of an uncompacted context, stored as `store`."""
    quantizer, full = quantizer_of(store), set(full_layers(context))
    layers: list[Entries] = []
    for i in range(len(context.loaded.geometry.layers)):
        heads = dense(context.cache, i)
        layers.append(heads if quantizer is None or i not in full else quantizer.pack(heads))
    return layers


def _that_fits(loaded: LoadedModel, ids: list[int], tokens: int) -> str:
    """The longest start of a generated text that keeps the context within `tokens` tokens."""
    for end in range(len(ids), 0, -1):
        text = whole_text(loaded.tokenizer, ids[:end]).strip()
        if len(loaded.chat.open_document(text).ids) <= tokens:
            return text
    return ""


def shuffled(context: Context, request: Request, passes: Passes, progress: Progress) -> Made:
    """A control that must fail: `highest-attention` with its values in random order."""
    named = replace(request, method="highest-attention")
    made, layers = compacted(context, named, passes, progress)
    generator = torch.Generator().manual_seed(request.seed)
    broken: list[Entries] = list(layers)
    for i in full_layers(context):
        heads = layers[i].unpack()
        order = torch.cat(
            [
                start + torch.randperm(t, generator=generator)
                for start, t in zip(heads.offsets, heads.lengths, strict=False)
            ]
        ).to(heads.device)
        broken[i] = replace(heads, values=Numbers(heads.values.stored()[order]))
    cache = shared(context, broken)
    return Made(cache, made.stored_bytes, made.full_bytes, made.budget, made.seconds)


SPECIAL: dict[str, Callable[[Context, Request, Passes, Progress], Made]] = {
    "summary": summary,
    "shuffled": shuffled,
}
"""What can be measured besides the registered methods."""


def make(context: Context, request: Request, passes: Passes, progress: Progress) -> Made:
    """The context made by a method or by one of `SPECIAL`."""
    if request.method in SPECIAL:
        return SPECIAL[request.method](context, request, passes, progress)
    return compacted(context, request, passes, progress)[0]


def expanded(name: str) -> list[str]:
    """The methods that a name stands for: itself, or all."""
    if name != ALL:
        return [name]
    found = [other for other in methods.names() if methods.get(other).selection != "all"]
    return [*found, "summary"]


def ratios(name: str, wanted: Sequence[float]) -> list[float]:
    """The ratios that make sense for a method: one that keeps everything has only 1.

    Raises UsageError for an unknown method, with the nearest name.
    """
    if name in SPECIAL:
        return list(wanted)
    method = methods.get(name, also=tuple(SPECIAL))
    return [1.0] if method.selection == "all" else list(wanted)


def require(request: Request, tokens: int | None = None) -> None:
    """Raises UsageError for a ratio, budget or source of queries that makes no sense."""
    special = request.method in SPECIAL
    check(replace(request, method="highest-attention") if special else request, tokens)
