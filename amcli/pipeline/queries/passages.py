"""The passages fed to the model for reference queries, by source.

`repeat` makes the model say the document again, part by part (KVzip, arXiv 2505.23416; Attention
Matching, arXiv 2602.16284, section 3). `quotes` feeds it questions that quote the document, with
its sentences as answers (see `quotes`); in `self-study` it asks and answers questions itself (see
`self_study`). `context` takes the context itself, as it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from amcli.errors import UsageError, did_you_mean
from amcli.models.spoken import quoted
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.queries.catalogue import MIXTURE
from amcli.pipeline.queries.prompts import REPEAT, REPEAT_FROM
from amcli.pipeline.queries.quotes import exchanges
from amcli.pipeline.queries.self_study import Exchange, dialogues, question_count, study
from amcli.system.progress import Progress

PART = 2048
"""Document tokens repeated at a time: bounds the positions the pass needs beyond the document's."""

OWN_PART = 512
"""Document tokens repeated at a time where each part scores only its own keys."""

_HEAD = 12  # tokens that identify a part


@dataclass(frozen=True)
class Passage:
    """Tokens fed from position `start` on; the queries of `ids[first:]` are reference queries.

    start   the context's length, or less: the context's own tokens, read once more
    part    positions of the context that the passage is about
    own     whether its queries score only the keys of that part
    asked   number of questions in it that the model asked itself
    """

    ids: list[int]
    first: int
    start: int
    part: slice
    own: bool = False
    asked: int = 0


def repeat_passages(context: Context, part: int = PART) -> list[Passage]:
    """The document in parts of at most `part` tokens, each after its instruction.

    Parts are shortened where the model's positions end. Raises UsageError when not even a short
    part fits after the document.
    """
    document = context.document
    tokenizer, room = context.loaded.tokenizer, _room(context, part)
    passages = []
    for start in range(0, len(document), room):
        piece = document[start : start + room]
        if len(piece) == len(document):
            instruction = REPEAT
        else:
            instruction = REPEAT_FROM.format(start=quoted(tokenizer, piece[:_HEAD]))
        lead = context.lead(instruction)
        # Tokens before and after the document belong to its first and last part.
        begin = 0 if start == 0 else context.document_start + start
        end = context.document_start + start + len(piece)
        part_of = slice(begin, context.T if end == context.document_end else end)
        passages.append(Passage(lead + piece, len(lead), context.T, part_of))
    return passages


def _room(context: Context, part: int = PART) -> int:
    """Tokens of the document that can be said again at a time, `part` at most.

    Raises UsageError when not even a short part fits after the document.
    """
    limit = context.loaded.geometry.max_positions
    room = part if limit is None else min(part, limit - context.T - 64)
    if room < min(32, len(context.document)):
        raise context.no_room("to repeat a document")
    return room


def own_passages(context: Context) -> list[Passage]:
    """The document in short parts, each of which scores only its own keys.

    KVzip's saving (arXiv 2505.23416, section 3.3): scoring costs T times the length of a part
    instead of T². What a part's tokens would attend to in the rest of the document goes unseen.
    """
    return [replace(passage, own=True) for passage in repeat_passages(context, OWN_PART)]


def context_passages(context: Context, last: int | None = None) -> list[Passage]:
    """The context itself, as it was read; only its `last` tokens, if given."""
    start = 0 if last is None else max(0, context.T - last)
    return [Passage(context.ids[start:], 0, start, slice(0, context.T))]


def study_passages(context: Context, seed: int, progress: Progress) -> list[Passage]:
    """Questions that the model asked itself and its answers, several to a conversation.

    Both questions and answers give reference queries: what they mention is looked up on the way.
    """
    count = question_count(len(context.document))
    found = study(context, count, seed=seed, progress=progress)
    return _conversations(context, found, asked=True)


def quote_passages(context: Context, seed: int, share: float = 1.0) -> list[Passage]:
    """The document's sentences as answers to questions that quote them, several to a conversation.

    Both questions and answers give reference queries. Raises UsageError when not even a short
    conversation fits after the document.
    """
    _room(context)
    return _conversations(context, exchanges(context, seed, share))


def _conversations(
    context: Context, found: Sequence[Exchange], asked: bool = False
) -> list[Passage]:
    """Exchanges after the context, all of whose tokens give reference queries.

    asked  whether the model asked the questions itself
    """
    limit = context.loaded.geometry.max_positions
    room = PART if limit is None else min(PART, limit - context.T)
    whole = slice(0, context.T)
    return [
        Passage(ids[:room], 0, context.T, whole, asked=count if asked else 0)
        for ids, count in dialogues(context, found, room)
    ]


QuerySource = Callable[[Context, int, Progress], list[Passage]]
"""A way to make reference queries: `passages(context, seed, progress)`."""

SOURCES: dict[str, QuerySource] = {
    "repeat": lambda context, seed, progress: repeat_passages(context),
    "quotes": lambda context, seed, progress: quote_passages(context, seed),
    "self-study": study_passages,
    "repeat-parts": lambda context, seed, progress: own_passages(context),
    "context": lambda context, seed, progress: context_passages(context),
}
"""Ways to make reference queries, by their catalogue names."""


def sources(name: str) -> tuple[str, ...]:
    """The sources of a mixture such as `repeat+self-study`. Raises UsageError for unknown ones."""
    found = tuple(dict.fromkeys(part.strip() for part in name.split("+")))
    for part in found:
        if part not in SOURCES:
            meant = did_you_mean(part, SOURCES)
            raise UsageError(
                f"unknown reference queries {part!r}",
                f"{meant}queries: {', '.join(SOURCES)}, or a mixture such as {MIXTURE}",
                code="unknown-queries",
                field="queries",
                queries=part,
            )
    return found
