"""Reference queries: queries that stand for those of future questions about a document.

The model is fed passages (see `passages`), and the queries of every layer are watched on the way.
One pass scores all keys by all queries; a seeded sample of the queries is kept for the fits.
Several sources make a mixture; see `mixed`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from amcli.matching.methods import Look, Watcher, WatchFunction
from amcli.matching.sample import Queries, Sample
from amcli.matching.scores import SCORE_KINDS, ScoreKind, ScoreState, Stats
from amcli.matching.tiles import Logits
from amcli.models.cache import CompactCache
from amcli.models.generate import CHUNK, absorb
from amcli.models.layer import After, CompactLayer
from amcli.models.rotary import Rotary
from amcli.pipeline.contexts.context import Context, full_layers, live_keys
from amcli.pipeline.queries.passages import Passage
from amcli.system.progress import Progress

MAX_QUERIES = 16384
"""Reference queries per KV head for the fits at most, over all query heads of its group: with a
quarter of them, a real model lost a tenth to a half more of its answers (docs/methods.md)."""

MAX_QUERIES_CPU = 4096
"""The same on a CPU, where the fits would take four times as long."""


def most_queries(device: torch.device) -> int:
    """Reference queries per KV head for the fits on that device, unless the user says otherwise."""
    return MAX_QUERIES_CPU if device.type == "cpu" else MAX_QUERIES


@dataclass(frozen=True)
class LayerReference:
    """What one layer's reference queries found.

    scores   attention that all queries, sampled or not, paid to each key
    sample   the queries that the fits use, with their attention to the document; W is each query's
             share of softmax mass on the document (1 minus what falls on the tokens fed since)
    others   further sources, whose scores count as well
    asked    questions that the model asked itself
    watched  a method's own view of the queries; the sample is then empty and there are no scores
    rows     queries per KV head that were watched
    """

    scores: ScoreState
    sample: Sample
    others: tuple[LayerReference, ...] = ()
    asked: int = 0
    watched: Watcher | None = None
    rows: int = 0

    def ranked(self, kind: ScoreKind) -> torch.Tensor:
        """`[H, T]`: scores by `kind`, of all sources together, as if each had asked as often."""
        sources = (*self.others, self)
        found = torch.stack([source.scores.scores(kind) for source in sources])
        if kind == "max":
            return found.amax(0)
        return found.mean(0) if kind == "mean" else found.square_().mean(0).sqrt_()

    @property
    def count(self) -> int:
        """Reference queries per KV head: those of the sample, or all that were watched."""
        return self.rows if self.watched is not None else self.sample.Q.shape[1]


def mixed(
    parts: Sequence[dict[int, LayerReference]], max_queries: int, seed: int
) -> dict[int, LayerReference]:
    """Several sources together: keys rank by their attention to all of them, each source counting
    the same, and the fits use queries of all, `max_queries` in all: a quarter from each source
    after the first, or equal shares of more than four sources.

    Keys have to serve both; ranking by the geometric mean, which drops a key that one source hardly
    looks at, lost three times as much of free-form answers (docs/methods.md). So do fits to one
    source alone lose what others ask.
    """
    *others, last = parts
    share = max_queries // max(4, len(parts))
    counts = [max_queries - share * len(others), *[share] * len(others)]

    def together(layer: int) -> LayerReference:
        return replace(
            last[layer],
            sample=Sample.joined(
                [
                    part[layer].sample.part(count, seed)
                    for part, count in zip(parts, counts, strict=True)
                ]
            ),
            others=tuple(part[layer] for part in others),
            asked=sum(part[layer].asked for part in parts),
        )

    return {layer: together(layer) for layer in last}


def collect(
    context: Context,
    passages: Sequence[Passage],
    *,
    max_queries: int = MAX_QUERIES,
    seed: int = 0,
    kinds: Collection[ScoreKind] = SCORE_KINDS,
    watch: WatchFunction | None = None,
    rotary: Rotary | None = None,
    progress: Progress,
) -> dict[int, LayerReference]:
    """Feeds each passage and collects the queries of every full layer.

    Each passage sees itself and the context before it, not the others. The context's cache does
    not change, but a passage that reads the whole context again needs a second cache of its size.
    `kinds` are the scores that will be asked for. `watch` makes a watcher that is shown all queries
    instead, also before RoPE if a `rotary` is given. Returns one `LayerReference` for each index in
    `full_layers`.
    """
    recorder = _Recorder(context, passages, max_queries, seed, kinds, watch, rotary)
    progress.start("reference pass", sum(len(p.ids) for p in passages))
    for passage in passages:
        recorder.open(passage)
        cache = _cache_at(context, passage.start)
        with cache.observe(recorder.observe):
            for ids in _chunks(passage.ids):
                absorb(context.loaded.model, cache, ids, len(ids))
                progress.advance(len(ids))
    asked = sum(passage.asked for passage in passages)
    return {index: replace(found, asked=asked) for index, found in recorder.finish().items()}


def _cache_at(context: Context, position: int) -> CompactCache:
    """A cache of the context's tokens before `position`, ready to be extended."""
    if context.before + position > 0:
        fork = context.cache.fork()
        try:
            fork.truncate(context.before + position)
            return fork
        except ValueError:  # a sliding layer has forgotten that far back
            if context.before:  # the prefix cannot be read again
                raise
    cache = CompactCache.empty(context.loaded.geometry)
    if position > 0:
        absorb(context.loaded.model, cache, context.ids[:position], CHUNK)
    return cache


def _chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), CHUNK):
        yield ids[start : start + CHUNK]


@dataclass
class _Growing:
    """What one layer's queries have found so far.

    parts   `[H, m, d]`, the sample's queries of each chunk, with `shares [H, m]`, their W, and
            `totals [H, m]`, the log of their mass on all they see, where W has to wait for their
            mass on the document
    rows    queries per KV head that were watched
    """

    scores: ScoreState
    logits: Logits
    watched: Watcher | None
    rows: int = 0
    parts: list[torch.Tensor] = field(default_factory=list)
    shares: list[torch.Tensor] = field(default_factory=list)
    totals: list[torch.Tensor | None] = field(default_factory=list)

    def finished(self, K: torch.Tensor, V: torch.Tensor) -> LayerReference:
        """The layer's reference, with the sample's attention to `K [H, T, d]`, `V [H, T, dv]`."""
        sample = Sample(K[:, :0], None, self.logits)
        if self.watched is None and self.parts:
            found = Queries.over(torch.cat(self.parts, dim=1), None, K, V, self.logits)
            masses = torch.split(found.lse, [part.shape[1] for part in self.parts], dim=1)
            for i, (mass, total) in enumerate(zip(masses, self.totals, strict=True)):
                if total is not None:
                    self.shares[i] = (mass - total).exp().clamp_max(1.0)
            W, truth = torch.cat(self.shares, dim=1), Stats(found.lse, found.Y)
            sample = Sample(found.Q, W, self.logits, truth=truth)
        return LayerReference(self.scores, sample, watched=self.watched, rows=self.rows)


class _Recorder:
    """Watches the queries of a pass; each layer's scores and sample grow along the way."""

    def __init__(
        self,
        context: Context,
        passages: Sequence[Passage],
        max_queries: int,
        seed: int,
        kinds: Collection[ScoreKind],
        watch: WatchFunction | None,
        rotary: Rotary | None,
    ):
        self.context = context
        self.T = context.T
        self.kinds = kinds
        self.watch = watch
        self.rotary = rotary
        self.full = set(full_layers(context))
        self.layers: dict[int, _Growing] = {}
        geometry = context.loaded.geometry
        group = max(
            geometry.query_heads[i] // geometry.layers[i].kv_heads for i in full_layers(context)
        )
        self.picked = _sample(passages, max(1, max_queries // group), seed)
        self.number = -1
        self.passage = passages[0]

    def open(self, passage: Passage) -> None:
        """The next passage begins."""
        self.number += 1
        self.passage = passage

    def finish(self) -> dict[int, LayerReference]:
        """What the pass found for each full layer."""
        found = {}
        for index in list(self.layers):  # one at a time, so that its chunks are freed
            found[index] = self.layers.pop(index).finished(*live_keys(self.context, index))
        return found

    def observe(
        self,
        index: int,
        query: torch.Tensor,
        layer: CompactLayer,
        scaling: float | None,
        softcap: float | None,
    ) -> After | None:
        """Adds the queries of one chunk `[1, Hq, m, d]` at one layer, once their mass is known."""
        if index not in self.full:
            return None
        keys = layer.live()[0][0]  # [H, seen, d], the chunk's own included
        H, _, d = keys.shape
        m = query.shape[2]
        logits = Logits(d**-0.5 if scaling is None else scaling, softcap)
        growing = self.layers.get(index)
        if growing is None:
            # With a watcher there is nothing to score; the empty sample still has its fields.
            state = ScoreState(H, self.T, device=keys.device, kinds=self.kinds)
            watched = None if self.watch is None else self.watch()
            growing = self.layers[index] = _Growing(state, logits, watched)
        look = self._look(index, query[0].reshape(H, -1, m, d), keys, logits)
        if growing.watched is None:
            return partial(self._record, growing, look)
        growing.watched.update(look)
        growing.rows += look.limit.shape[0] * look.Q.shape[1]
        return None

    def _look(self, index: int, Q: torch.Tensor, keys: torch.Tensor, logits: Logits) -> Look:
        """The chunk `Q [H, G, m, d]` and the keys of the context and of the passage."""
        seen, m = keys.shape[1], Q.shape[2]
        position = torch.arange(seen - m, seen, device=Q.device)  # [m]
        after = self.passage.start >= self.T
        # A pass over the context's own tokens has seen only some of the keys to be scored.
        K = keys[:, : self.T] if after else live_keys(self.context, index)[0]
        unrotated = None
        if self.rotary is not None:
            unrotated = self.rotary.unrotate(index, Q, self.context.before + position)
        return Look(
            Q=Q,
            K=K,
            limit=(position + 1).clamp_max(self.T),
            fed=keys[:, self.T :] if after else None,
            fed_limit=position + 1 - self.T if after else None,
            first=seen - m,
            part=self.passage.part,
            logits=logits,
            unrotated=unrotated,
        )

    def _record(self, growing: _Growing, look: Look, mass: torch.Tensor | None) -> None:
        """Scores keys by the chunk's reference queries, and keeps those of the sample.

        mass  `[1, Hq, m]`, the log of the queries' mass on all they saw, if known
        """
        m = look.Q.shape[2]
        before = look.first - self.passage.start  # tokens of the passage fed in earlier chunks
        skip = max(0, self.passage.first - before)
        if skip >= m:
            return
        look = replace(
            look,
            Q=look.Q[:, :, skip:],
            limit=look.limit[skip:],
            fed_limit=None if look.fed_limit is None else look.fed_limit[skip:],
        )
        Q, limit, fed_limit = look.rows()  # by query head of the group, then by token
        part = self.passage.part if self.passage.own else slice(0, self.T)
        total = None
        if mass is not None and not self.passage.own:
            total = mass.view(*look.Q.shape[:2], m)[:, :, skip:].flatten(1, 2)
        chosen = self.picked[self.number][before + skip : before + m].repeat(look.Q.shape[1])
        rows = chosen.nonzero().squeeze(1).to(Q.device)  # found on the host: nothing waits for it
        later = total is not None and look.fed is not None  # see `_Growing`
        W = growing.scores.update(
            Q,
            look.K[:, part],
            look.logits,
            limit=limit if look.fed is None else None,
            fed=look.fed,
            fed_limit=fed_limit,
            total=total,
            start=part.start,
            rows=rows[:0] if later else rows,
        )
        growing.parts.append(Q[:, rows])
        growing.shares.append(W)
        growing.totals.append(total[:, rows] if later and total is not None else None)


def _sample(passages: Sequence[Passage], count: int, seed: int) -> list[torch.Tensor]:
    """For each passage, a mask over its tokens: a seeded sample of `count` reference tokens."""
    masks = [torch.zeros(len(p.ids), dtype=torch.bool) for p in passages]
    generator = torch.Generator().manual_seed(seed)
    places = [(i, j) for i, p in enumerate(passages) for j in range(p.first, len(p.ids))]
    for k in torch.randperm(len(places), generator=generator)[:count].tolist():
        i, j = places[k]
        masks[i][j] = True
    return masks
