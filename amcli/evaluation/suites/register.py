"""`register` and `register-sparse`: documents that pocket can read, with three kinds of question.

Exact match of the whole answer. Pocket was not trained on any of these seeds. A register is almost
nothing but facts, one per eleven tokens or so; the sparse ones have filler after every block, so
that there is one fact per SPARSE tokens or so, as in ordinary handbooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from amcli.evaluation.suites.base import Document, Measure, Question, Suite, Wanted
from amcli.generator import filler
from amcli.generator.dialogues import QUESTION_KINDS, Questioner
from amcli.generator.documents import Block, blocks, cut

QUESTIONS = 10
"""Default number of questions of each kind."""

SPARSE = 40
"""Tokens per fact in a sparse register."""

_TRIES = 8  # draws to get a document that has questions


def documents(wanted: Wanted, sparse: bool = False) -> Iterator[Document]:
    """`wanted.docs` registers of at most `wanted.tokens` tokens."""
    count = QUESTIONS if wanted.questions is None else wanted.questions
    name = "register-sparse" if sparse else "register"
    measure = wanted.measure
    blank = measure.one("\n\n")
    found = 0
    for index in range(_TRIES * wanted.docs):
        seed = f"eval/{name}/{wanted.seed}/{wanted.tokens}/{index}"
        source = blocks(Random(seed))
        if sparse:
            source = _thinned(source, Random(f"{seed}/filler"), measure)
        document = cut(source, wanted.tokens, measure.count, blank)
        questioner, rng = Questioner(document), Random(f"{seed}/questions")
        asked = tuple(
            Question(found.question, found.answer, kind)
            for kind in QUESTION_KINDS
            for found in questioner.distinct(rng, kind, count)
        )
        if asked:  # a short document may state nothing to ask about
            yield Document(f"{name} {found}", document.text, asked)
            found += 1
        if found == wanted.docs:
            return


def _thinned(source: Iterator[Block], rng: Random, measure: Measure) -> Iterator[Block]:
    """The same blocks, each followed by as much filler as its facts call for."""
    owed = 0
    for block in source:
        yield block
        owed += SPARSE * len(block.facts) - measure.one(block.text)
        while owed > 0:
            paragraph = Block(filler.paragraph(rng))
            yield paragraph
            owed -= measure.one(paragraph.text)


REGISTER = Suite("register", "exact", documents)

SPARSE_REGISTER = Suite("register-sparse", "exact", lambda wanted: documents(wanted, sparse=True))
