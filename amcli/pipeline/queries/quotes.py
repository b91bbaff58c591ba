"""Quotes: questions made of the document's own words, answered in its own sentences.

Repeating a document only leads from each text to what comes next, and asks only once. Real
questions name something from the middle of a text, many times over, each in a turn of its own.
Here sentences answer questions that quote a few words of them, or of the one after, so that each
is asked for from elsewhere. Nothing is generated: the model only reads, about as many tokens as
the document has. Everything is chosen from one seed.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from amcli.models.spoken import quoted
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.queries.prompts import QUOTE_ABOUT, QUOTE_BEFORE, QUOTE_MORE, QUOTE_WORDS
from amcli.pipeline.queries.self_study import Exchange

LEAST, MOST = 8, 48
"""Tokens of a sentence; longer ones are cut, shorter ones go with what follows."""

PHRASE = 5
"""Tokens of the words that a question quotes."""

_ENDS = (".", "!", "?", "…", "。", "！", "？", "\n")  # full stops of all scripts


def sentences(context: Context) -> list[tuple[int, int]]:
    """The document in pieces of LEAST to MOST tokens that end where sentences or lines do, if they
    can: first token and the one after the last, as positions in the document. The last piece may
    be shorter."""
    ids, tokenizer = context.document, context.loaded.tokenizer
    texts = {i: str(tokenizer.decode([i])) for i in set(ids)}
    cuts = [0]
    for at, token in enumerate(ids, 1):
        length = at - cuts[-1]
        text = texts[token]
        ends = "\n" in text or text.rstrip().endswith(_ENDS)
        if length >= MOST or (ends and length >= LEAST):
            cuts.append(at)
    if cuts[-1] < len(ids):
        cuts.append(len(ids))
    return list(pairwise(cuts))


def exchanges(context: Context, seed: int, share: float = 1.0) -> list[Exchange]:
    """Sentences in a seeded order, each as the answer to a question, until they have that share of
    as many tokens as the document, questions included.

    By turns: what is said about a few words of it, more about them (with the next sentence), which
    sentence has these words, and what comes before the next one.
    """
    ids, pieces, chat = context.document, sentences(context), context.loaded.chat
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pieces), generator=generator).tolist()
    places = torch.rand(len(pieces), generator=generator).tolist()

    def words(first: int, last: int) -> str:
        return quoted(context.loaded.tokenizer, ids[first:last])

    found: list[Exchange] = []
    left = share * len(ids)
    for turn, i in enumerate(order):
        if found and left <= 0:
            break
        first, last = pieces[i]
        begin = first + int(places[i] * max(1, last - first - PHRASE))
        phrase = words(begin, min(last, begin + PHRASE))
        following = pieces[i + 1] if i + 1 < len(pieces) else None
        answer = words(first, last)
        form = turn % 4
        if form == 1 and following is not None:
            answer = words(first, following[1])
        if form == 3 and following is not None:
            phrase = words(following[0], min(following[1], following[0] + 2 * PHRASE))
            question = QUOTE_BEFORE.format(start=phrase)
        else:
            question = (QUOTE_ABOUT, QUOTE_MORE, QUOTE_WORDS, QUOTE_ABOUT)[form].format(
                words=phrase
            )
        if phrase and answer:
            found.append(Exchange(question, answer))
            left -= len(chat.next_turn(question)) + len(chat.answer_ids(answer))
    return found
