"""`perplexity`: the second half of a text, given its first half as the context.

Nothing is asked: the text continues inside the user's turn, and the likelihood of every token of
the second half except its first is measured. There is no recall; agreement says how often the
likeliest next token is the same as the full context's.
"""

from __future__ import annotations

from collections.abc import Iterator

from amcli.errors import UsageError
from amcli.evaluation.suites.base import Document, Question, Suite, Wanted
from amcli.pipeline.contexts.source import read_source

_SHORTEST = 8  # tokens of half a window: fewer say nothing


def documents(wanted: Wanted) -> Iterator[Document]:
    """Up to `wanted.docs` windows of `wanted.tokens` tokens, one after the other, halved."""
    if wanted.path is None:
        raise UsageError(
            "suite perplexity reads a text file",
            "name one, such as book.txt",
            code="suite-wants-file",
            field="path",
            suite="perplexity",
        )
    rest = read_source(str(wanted.path)).text
    measure, half = wanted.measure, wanted.tokens // 2
    for index in range(wanted.docs):
        first = measure.cut(rest, half)
        second = measure.cut(rest[len(first) :], half)
        if min(measure.count([first, second])) < half // 2:  # only a remainder of the text is left
            if index:
                return
            first = measure.cut(rest, measure.one(rest) // 2)
            second = rest[len(first) :]
            if min(measure.count([first, second])) < _SHORTEST:
                raise UsageError(
                    f"{wanted.path} is too short to be halved",
                    "give a longer text",
                    code="text-too-short",
                    field="path",
                    path=wanted.path,
                )
        yield Document(
            f"part {index + 1}", first, (Question(second, "", "text", continuation=True),)
        )
        rest = rest[len(first) + len(second) :].lstrip()


PERPLEXITY = Suite(
    "perplexity",
    "none",
    documents,
    docs=1,
)
