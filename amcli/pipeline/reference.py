"""Reference queries: queries that stand for those of future questions about a document.

`repeat` makes the model say the document again, part by part, and looks at the queries of every
layer on the way (KVzip, arXiv 2505.23416; Attention Matching, arXiv 2602.16284, section 3).
One pass gives the scores of all keys from all queries; for the fits a seeded sample is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from amcli.errors import UsageError
from amcli.matching.scores import SCORE_KINDS, ScoreKind, ScoreState
from amcli.models.generate import CHUNK, absorb
from amcli.models.layer import CompactLayer
from amcli.pipeline.contexts import Context, full_layers
from amcli.pipeline.progress import Progress
from amcli.prompts import REPEAT, REPEAT_FROM

PART = 2048
"""Document tokens repeated at a time: bounds the positions the pass needs beyond the document's."""

_HEAD = 12  # tokens by which a part is named

MAX_QUERIES = 4096
"""Reference queries per KV head that the fits may use, all query heads of its group together."""


@dataclass(frozen=True)
class Passage:
    """Tokens fed after the context in one go; the queries of `ids[first:]` are references."""

    ids: list[int]
    first: int


@dataclass
class LayerReference:
    """What one layer's reference queries say.

    Q        `[H, n, d]`, post-RoPE; `weights [H, n]`: each query's share of softmax mass on
             the document (1 minus what falls on the tokens fed since)
    scores   what all queries, sampled or not, paid to each key
    scale    factor of the logits; softcap as the model has it, or None
    """

    scores: ScoreState
    scale: float = 1.0
    softcap: float | None = None
    parts: list[torch.Tensor] = field(default_factory=list)
    shares: list[torch.Tensor] = field(default_factory=list)

    @property
    def Q(self) -> torch.Tensor:
        """`[H, n, d]` in the model's dtype."""
        return torch.cat(self.parts, dim=1)

    @property
    def weights(self) -> torch.Tensor:
        """`[H, n]` float32 in (0, 1]."""
        return torch.cat(self.shares, dim=1)


def repeat_passages(context: Context, part: int = PART) -> list[Passage]:
    """The document in parts of at most `part` tokens, each after its instruction.

    Parts are shortened where the model's positions end. Raises UsageError when not even a short
    part fits behind the document.
    """
    document = context.ids[context.document_start : context.document_end]
    chat = context.loaded.chat
    tokenizer = context.loaded.tokenizer
    limit = context.loaded.geometry.max_positions
    room = part if limit is None else min(part, limit - context.T - 64)
    if room < min(32, len(document)):
        raise UsageError(
            f"the model's {limit:,} positions leave no room to repeat a document of "
            f"{context.T:,} tokens",
            "shorten the document, or choose a model with a longer context with --model",
        )
    passages = []
    for start in range(0, len(document), room):
        piece = document[start : start + room]
        if len(piece) == len(document):
            instruction = REPEAT
        else:
            head = str(tokenizer.decode(piece[:_HEAD], skip_special_tokens=True))
            instruction = REPEAT_FROM.format(start=head.strip())
        lead = chat.first_turn(instruction)
        passages.append(Passage(lead + piece, len(lead)))
    return passages


SOURCES: dict[str, Callable[[Context], list[Passage]]] = {"repeat": repeat_passages}
"""Ways to make reference queries, by the name that `--queries` takes."""


def collect(
    context: Context,
    passages: Sequence[Passage],
    *,
    max_queries: int = MAX_QUERIES,
    seed: int = 0,
    kinds: Collection[ScoreKind] = SCORE_KINDS,
    progress: Progress,
) -> dict[int, LayerReference]:
    """Feeds each passage after the context and gathers the queries of every full layer.

    Each passage sees the context and itself, not the others. The context's cache is left as
    it was; `kinds` are the scores that will be asked for. Returns one `LayerReference` for
    each index in `full_layers`.
    """
    recorder = _Recorder(context, passages, max_queries, seed, kinds)
    progress.start("reference pass", sum(len(p.ids) for p in passages))
    for passage in passages:
        recorder.open(passage)
        fork = context.cache.fork()
        with fork.observe(recorder.observe):
            for ids in _chunks(passage.ids):
                absorb(context.loaded.model, fork, ids, len(ids))
                progress.advance(len(ids))
    return recorder.layers


def _chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), CHUNK):
        yield ids[start : start + CHUNK]


class _Recorder:
    """Watches the queries of a pass; each layer's scores and sample grow as it goes."""

    def __init__(
        self,
        context: Context,
        passages: Sequence[Passage],
        max_queries: int,
        seed: int,
        kinds: Collection[ScoreKind],
    ):
        self.T = context.T
        self.kinds = kinds
        self.full = set(full_layers(context))
        self.layers: dict[int, LayerReference] = {}
        geometry = context.loaded.geometry
        group = max(
            geometry.query_heads[i] // geometry.layers[i].kv_heads for i in full_layers(context)
        )
        self.picked = _sample(passages, max(1, max_queries // group), seed)
        self.passage = -1
        self.first = 0

    def open(self, passage: Passage) -> None:
        """The next passage begins."""
        self.passage += 1
        self.first = passage.first

    def observe(
        self,
        index: int,
        query: torch.Tensor,
        layer: CompactLayer,
        scaling: float | None,
        softcap: float | None,
    ) -> None:
        """Adds the reference queries of one chunk `[1, Hq, m, d]` at one layer."""
        if index not in self.full:
            return
        keys = layer.live()[0][0]  # [H, T + fed, d]
        H, seen, d = keys.shape
        m = query.shape[2]
        before = seen - self.T - m  # tokens of the passage fed in earlier chunks
        skip = max(0, self.first - before)
        if skip >= m:
            return
        scale = d**-0.5 if scaling is None else scaling
        # Rows run over the group's query heads, then over tokens: [H, G·(m - skip), d].
        Q = query[0].reshape(H, -1, m, d)[:, :, skip:].flatten(1, 2)
        groups = Q.shape[1] // (m - skip)
        limit = torch.arange(before + skip + 1, before + m + 1, device=Q.device).repeat(groups)
        K, fed = keys[:, : self.T], keys[:, self.T :]
        reference = self.layers.get(index)
        if reference is None:
            state = ScoreState(H, self.T, device=Q.device, kinds=self.kinds)
            reference = self.layers[index] = LayerReference(state, scale, softcap)
        W = reference.scores.update(Q, K, scale, softcap=softcap, fed=fed, fed_limit=limit)
        chosen = self.picked[self.passage][before + skip : before + m].to(Q.device)
        rows = chosen.repeat(groups).nonzero().squeeze(1)
        reference.parts.append(Q[:, rows].clone())
        reference.shares.append(W[:, rows])


def _sample(passages: Sequence[Passage], count: int, seed: int) -> list[torch.Tensor]:
    """For each passage a mask over its tokens: a seeded sample of `count` reference tokens."""
    masks = [torch.zeros(len(p.ids), dtype=torch.bool) for p in passages]
    places = [(i, j) for i, p in enumerate(passages) for j in range(p.first, len(p.ids))]
    generator = torch.Generator().manual_seed(seed)
    for k in torch.randperm(len(places), generator=generator)[:count].tolist():
        i, j = places[k]
        masks[i][j] = True
    return masks
