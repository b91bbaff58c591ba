"""`register`: the documents that pocket was trained to read, and its three kinds of question.

Exact match of the whole answer. The seeds are none of those that pocket was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from amcli.evaluation.suites.base import Document, Question, Request, Suite, register
from amcli.pocket.dialogues import KINDS, Questioner
from amcli.pocket.documents import generate

QUESTIONS = 10
"""Of each kind, unless the user says otherwise."""


def documents(request: Request) -> Iterator[Document]:
    """`request.docs` registers of at most `request.tokens` tokens."""
    count = QUESTIONS if request.questions is None else request.questions
    blank = request.measure.one("\n\n")
    for index in range(request.docs):
        seed = f"eval/register/{request.seed}/{request.tokens}/{index}"
        document = generate(seed, request.tokens, request.measure.count, blank)
        questioner, rng = Questioner(document), Random(f"{seed}/questions")
        asked = tuple(
            Question(found.question, found.answer, kind)
            for kind in KINDS
            for found in questioner.distinct(rng, kind, count)
        )
        yield Document(f"register {index}", document.text, asked)


REGISTER = register(
    Suite("register", "pocket's registers: direct, reverse and two-hop questions", "exact",
          documents)
)  # fmt: skip
