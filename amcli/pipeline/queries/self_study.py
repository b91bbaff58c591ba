"""Self-study: the model asks itself questions about the context, and answers them.

Repeating a document only leads from each text to what comes next. Questions also lead other ways
(from a value back to its subject, from one fact to another), and answers name what the questions
are about: their queries are those that later conversations will have (Eyuboglu et al., arXiv
2506.06266; Zweiger et al., arXiv 2602.16284). Questions come from the model and the context alone.
Everything is sampled from one seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amcli.errors import UsageError
from amcli.models.cache import CompactCache
from amcli.models.replies import answers
from amcli.models.spoken import quoted
from amcli.pipeline.contexts.context import Context, shared
from amcli.pipeline.queries.prompts import ASK, ASK_FROM
from amcli.system.progress import SILENT, Progress

TOKENS_PER_QUESTION = 4
"""Tokens of the document per question, within LEAST and MOST questions."""
LEAST, MOST = 32, 1024

SEEN = 1 << 23
"""Document tokens that all questions together may see: from 8k tokens on, the longer the document,
the fewer the questions, down to FEWEST. Each question looks at the whole document, so without this
limit asking would grow with the square of its length and soon take many times as long as reading
it."""
FEWEST = 256

TEMPERATURE = 1.0
"""For the questions; answers are greedy."""

QUESTION_TOKENS = 64
ANSWER_TOKENS = 64

ROUND = 64
"""Questions in the first round; after it the model may be told to look elsewhere."""

ROWS_ON_GPU = 512
"""Replies written at a time, later questions included, as far as their cache fits in a tenth of a
GPU's memory: a GPU hardly notices more rows, while ROUND of them keep a CPU busy. A tenth of all
memory, not of what is free: sampled questions depend on the number of rows, and one seed must
always give the same questions."""

_VARIED = 0.5  # a round with a smaller share of new questions makes the model look elsewhere
_START = 12  # tokens that identify a part of the document


@dataclass(frozen=True)
class Exchange:
    """A question that the model asked itself, and its answer."""

    question: str
    answer: str


def question_count(document_tokens: int) -> int:
    """How many questions to ask about a document of that length."""
    seen = max(FEWEST, SEEN // max(1, document_tokens))
    return max(LEAST, min(MOST, seen, document_tokens // TOKENS_PER_QUESTION))


def study(
    context: Context, count: int, *, seed: int = 0, progress: Progress = SILENT
) -> list[Exchange]:
    """Different questions about a context, `count` at most, with their answers.

    The instruction is the same for all, so what is asked is up to the model; if it keeps repeating
    itself, it is pointed to one part of the document after another. Raises UsageError for a model
    without a chat template, which does not follow instructions, and for one that asks nothing or
    answers nothing.
    """
    loaded = context.loaded
    if loaded.chat.raw:
        raise UsageError(
            f"{loaded.id} has no chat template, so it cannot be told to ask questions",
            "use queries='repeat+quotes', or an instruction-tuned model",
            code="template-missing",
            field="queries",
            model=loaded.id,
        )
    cache = shared(context)
    progress.start("questions about it", 2 * count)
    questions = _questions(context, cache, count, seed, progress)
    prompts = [context.lead(question) for question in questions]
    room = _room(context, max((len(p) for p in prompts), default=0))
    replies = answers(
        loaded, cache, prompts, [min(ANSWER_TOKENS, room)] * len(prompts), rows=_rows(context),
        advance=progress.advance,
    )  # fmt: skip
    pairs = zip(questions, replies, strict=True)
    found = [Exchange(question, answer) for question, answer in pairs if answer]
    if not found:
        raise UsageError(
            f"{loaded.id} has no answer to any question that it asked itself",
            "use queries='repeat+quotes'",
            code="no-self-study",
            field="queries",
            model=loaded.id,
        )
    return found


def _questions(
    context: Context, cache: CompactCache, count: int, seed: int, progress: Progress
) -> list[str]:
    """Questions in rounds, each worded differently from all before it."""
    loaded = context.loaded
    found: dict[str, None] = {}
    varied, start, number = True, 0, -1
    while start < count:
        number += 1
        size = min(_rows(context) if number else ROUND, count - start)
        asked = [ASK] * size if varied else _pointing(context, size, start, count)
        prompts = [context.lead(instruction) for instruction in asked]
        room = _room(context, max(len(p) for p in prompts))
        said = answers(
            loaded, cache, prompts, [min(QUESTION_TOKENS, room)] * size, rows=size,
            temperature=TEMPERATURE, seed=seed * 1_000_003 + number, advance=progress.advance,
        )  # fmt: skip
        before = len(found)
        found.update(dict.fromkeys(question for question in said if question))
        varied = varied and len(found) - before >= _VARIED * size
        start += size
    return list(found)


def _rows(context: Context) -> int:
    """How many replies are written at a time."""
    loaded = context.loaded
    if loaded.device.type != "cuda":
        return ROUND
    token = sum(x.kv_heads * (x.key_dim + x.value_dim) for x in loaded.geometry.layers)
    row = 2 * (QUESTION_TOKENS + ANSWER_TOKENS) * token * loaded.dtype.itemsize
    memory = torch.cuda.get_device_properties(loaded.device).total_memory
    return max(ROUND, min(ROWS_ON_GPU, memory // 10 // max(1, row)))


def _pointing(context: Context, size: int, start: int, count: int) -> list[str]:
    """Instructions that name parts of the document, evenly spread over it."""
    document = context.document
    step = max(1, len(document) // count)
    starts = [i * step for i in range(start, start + size)]
    heads = [quoted(context.loaded.tokenizer, document[i : i + _START]) for i in starts]
    return [ASK_FROM.format(start=head) for head in heads]


def _room(context: Context, prompt: int) -> int:
    """Tokens that fit after a prompt; UsageError when hardly any do."""
    limit = context.loaded.geometry.max_positions
    room = QUESTION_TOKENS if limit is None else limit - context.T - prompt
    if room < 8:
        raise context.no_room("for questions about a context")
    return room


def dialogues(
    context: Context, exchanges: Sequence[Exchange], tokens: int
) -> list[tuple[list[int], int]]:
    """The exchanges as conversations after the context: ids, about `tokens` of them at most, and
    the number of exchanges in each."""
    chat = context.loaded.chat
    found: list[tuple[list[int], int]] = []
    for exchange in exchanges:
        answer = chat.answer_ids(exchange.answer)
        turn = chat.next_turn(exchange.question) + answer
        if found and len(found[-1][0]) + len(turn) <= tokens:
            ids, count = found[-1]
            found[-1] = ids + turn, count + 1
        else:
            found.append((context.lead(exchange.question) + answer, 1))
    return found
