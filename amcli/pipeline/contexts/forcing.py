"""Teacher forcing: how a model rates right answers, with many questions per forward pass.

Greedy decoding gives exactly an answer if and only if every one of its tokens, and then an end
token, is the likeliest one given the tokens before it. So recall needs no generation, and the same
pass gives the likelihood of the answer and its divergence from the full context.

Rows are padded on the right: under a causal mask nothing that counts sees the padding. The
context's entries are a prefix that all rows share (`contexts.shared`), so memory is that of the
question and answer tokens; `Limits` bounds those and the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from amcli.models.cache import CompactCache
from amcli.models.calling import run
from amcli.models.generate import CHUNK
from amcli.models.geometry import decoder_of
from amcli.models.loading import LoadedModel


@dataclass(frozen=True)
class Limits:
    """What a forward pass may hold: tokens of all rows, logits of all rows, logits kept."""

    tokens: int = 4096
    logits: int = 2**25
    kept: int = 2**29

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """More room on a GPU. Depends only on the kind of device, so that numbers repeat."""
        return cls(16384, 2**27, 2**31) if device.type == "cuda" else cls()


@dataclass(frozen=True)
class Forced:
    """One question as tokens: each of `targets` is predicted after `prompt` and earlier targets.

    ends     whether the last target is the end of the answer
    options  ids of the letters of a multiple choice; the letter is target number `letter`
    """

    prompt: list[int]
    targets: list[int]
    ends: bool
    options: list[int] = field(default_factory=list)
    letter: int = 0

    @property
    def length(self) -> int:
        """Number of tokens fed: the last target is only predicted."""
        return len(self.prompt) + len(self.targets) - 1


@dataclass(frozen=True)
class Outcome:
    """The outcome of one question. Sums run over its `tokens` targets; likelihoods are in nats.

    exact  every target was the likeliest token; `agree`: how many predictions match the full
           context's
    kl     KL(full context ‖ this context); `choice`: index of the likeliest option, or None
    """

    exact: bool
    nll: float
    kl: float
    agree: int
    tokens: int
    choice: int | None


def end_token(loaded: LoadedModel) -> int | None:
    """The token that ends an answer; None for a model without a template, which has none."""
    if loaded.chat.raw:
        return None
    first = loaded.chat.next_turn("?")[0]
    stops = loaded.chat.stop_ids
    return first if first in stops else min(stops, default=None)


def answered(loaded: LoadedModel, prompt: list[int], answer: str) -> Forced:
    """An answer after a prompt, with the end of its turn, if the model has one."""
    end = end_token(loaded)
    targets = loaded.chat.answer_ids(answer) + ([] if end is None else [end])
    return Forced(prompt, targets, end is not None)


@dataclass
class Teacher:
    """Measures contexts on a fixed list of questions, against one reference: the full context.

    The reference's log-probabilities are kept up to `limits.kept` and recomputed beyond that;
    measure the reference first, and it is computed only once. Then `settle` lets go of the
    reference if all are kept.
    """

    loaded: LoadedModel
    questions: Sequence[Forced]
    reference: CompactCache | None
    limits: Limits
    _kept: dict[int, list[torch.Tensor]] = field(default_factory=dict, init=False)
    _room: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.batches = list(_batches(self.questions, self.limits.tokens))
        self.vocabulary: int = self.loaded.model.config.get_text_config(decoder=True).vocab_size
        self._room = self.limits.kept
        self._stops = torch.tensor(sorted(self.loaded.chat.stop_ids), device=self.loaded.device)

    def measure(self, cache: CompactCache) -> list[Outcome]:
        """The outcome of each question, in order, with `cache` as the context."""
        found: dict[int, Outcome] = {}
        for number, rows in enumerate(self.batches):
            found.update(zip(rows, self._batch(cache, number), strict=True))
        return [found[i] for i in range(len(self.questions))]

    def settle(self) -> None:
        """Lets go of the reference if it is no longer needed: it holds a whole document."""
        if len(self._kept) == len(self.batches):
            self.reference = None

    def _batch(self, cache: CompactCache, number: int) -> list[Outcome]:
        batch = [self.questions[i] for i in self.batches[number]]
        sums = _Sums(batch, self._stops)
        kept, itself = self._kept.get(number), cache is self.reference
        again = iter(kept or ())
        if kept is None and self.reference is not None and not itself:
            again = (piece.logp for piece in self._pieces(self.reference, batch))
        fresh: list[torch.Tensor] = []
        for piece in self._pieces(cache, batch):
            if itself:
                fresh.append(piece.logp)
            sums.add(piece, piece.logp if itself else next(again))
        size = sum(logp.numel() * logp.element_size() for logp in fresh)
        if fresh and kept is None and size <= self._room:
            self._kept[number] = fresh
            self._room -= size
        return sums.outcomes()

    @torch.no_grad()
    def _pieces(self, cache: CompactCache, batch: Sequence[Forced]) -> Iterator[_Piece]:
        """Runs a batch after a context; yields the predictions of the targets, in pieces."""
        model = self.loaded.model
        device = self.loaded.device
        rows = [q.prompt + q.targets[:-1] for q in batch]
        columns = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (columns - len(row)) for row in rows], device=device)
        fork = cache.fork(len(batch))
        width = max(1, self.limits.logits // (len(batch) * self.vocabulary))
        first = min(len(q.prompt) for q in batch) - 1  # the first column that predicts a target
        start = 0
        while first - start > CHUNK:  # long prompts: no logits where no row has a target yet
            part = ids[:, start : start + CHUNK]
            run(decoder_of(model), fork, part)
            start += CHUNK
        while start < columns:
            stop = min(columns, max(start, first) + width)
            keep = torch.arange(max(start, first) - start, stop - start, device=device)
            logits = run(model, fork, ids[:, start:stop], logits_to_keep=keep).logits
            fork.require_attended()
            yield _Piece.of(logits, batch, max(start, first))
            start = stop


@dataclass(frozen=True)
class _Piece:
    """`N` predictions: `logp [N, V]` float32; row, target and place of each, `[N]` int64."""

    logp: torch.Tensor
    row: torch.Tensor
    target: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, batch: Sequence[Forced], first: int) -> _Piece:
        """Those of `logits [B, c, V]`, for columns from `first` on, that predict a target."""
        found = []
        for i, q in enumerate(batch):
            begin = len(q.prompt) - 1  # the column that predicts target 0
            for c in range(max(first, begin), min(first + logits.shape[1], q.length)):
                found.append((i, c - first, q.targets[c - begin], c - begin))
        table = torch.tensor(found, dtype=torch.int64).view(-1, 4).to(logits.device)
        row, column, target, place = table.unbind(1)
        return cls(logits[row, column].float().log_softmax(-1), row, target, place)


class _Sums:
    """Adds up the pieces of a batch on the device; one transfer at the end."""

    def __init__(self, batch: Sequence[Forced], stops: torch.Tensor):
        device = stops.device
        self.batch, self.stops = batch, stops
        self.totals = torch.zeros(len(batch), 4, dtype=torch.float64, device=device)
        self.choice = torch.zeros(len(batch), dtype=torch.int64, device=device)
        self.last = torch.tensor([len(q.targets) - 1 if q.ends else -1 for q in batch]).to(device)
        self.letter = torch.tensor([q.letter for q in batch]).to(device)
        widest = max(len(q.options) for q in batch)
        padded = [q.options + [-1] * (widest - len(q.options)) for q in batch]
        self.options = torch.tensor(padded, dtype=torch.int64).to(device)  # [B, widest]

    def add(self, piece: _Piece, truth: torch.Tensor) -> None:
        """Adds one piece, given the reference's log-probabilities `[N, V]` at the same places."""
        logp, row = piece.logp, piece.row
        top = logp.argmax(-1)
        # Any end token ends an answer, not only the one the template writes.
        stopped = torch.isin(top, self.stops) & (piece.place == self.last[row])
        wrong = (top != piece.target) & ~stopped
        nll = -logp.gather(1, piece.target[:, None]).squeeze(1)
        values = [wrong, nll, divergence(truth, logp), top == truth.argmax(-1)]
        self.totals.index_add_(0, row, torch.stack([v.double() for v in values], dim=1))
        if self.options.shape[1]:
            options = self.options[row]
            found = logp.gather(1, options.clamp_min(0)).masked_fill(options < 0, -torch.inf)
            here = piece.place == self.letter[row]
            self.choice.index_add_(0, row, found.argmax(-1) * here)

    def outcomes(self) -> list[Outcome]:
        """The outcome of each row of the batch."""
        choices = self.choice.tolist()
        return [
            Outcome(
                exact=wrong == 0,
                nll=nll,
                kl=kl,
                agree=round(agree),
                tokens=len(q.targets),
                choice=choice if q.options else None,
            )
            for q, (wrong, nll, kl, agree), choice in zip(
                self.batch, self.totals.tolist(), choices, strict=True
            )
        ]


def divergence(truth: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    """KL(truth ‖ logp) in nats of log-probabilities `[N, V]`; `[N]`, float32, never negative."""
    p = truth.exp()
    # Zero probability adds nothing, even where both logarithms are -inf.
    terms = torch.where(p > 0, p * (truth - logp), 0.0)
    return terms.sum(-1).clamp_min(0.0)


def _batches(questions: Sequence[Forced], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, of at most `tokens` tokens including padding."""
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt), i))
    batch: list[int] = []
    longest = 0
    for i in order:
        length = max(longest, questions[i].length)
        if batch and length * (len(batch) + 1) > tokens:
            yield batch
            batch, length = [], questions[i].length
        batch.append(i)
        longest = length
    if batch:
        yield batch
