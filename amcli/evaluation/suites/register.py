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

_TRIES = 8  # documents drawn for one that has questions


def documents(request: Request) -> Iterator[Document]:
    """`request.docs` registers of at most `request.tokens` tokens."""
    count = QUESTIONS if request.questions is None else request.questions
    blank = request.measure.one("\n\n")
    found = 0
    for index in range(_TRIES * request.docs):
        seed = f"eval/register/{request.seed}/{request.tokens}/{index}"
        document = generate(seed, request.tokens, request.measure.count, blank)
        questioner, rng = Questioner(document), Random(f"{seed}/questions")
        asked = tuple(
            Question(found.question, found.answer, kind)
            for kind in KINDS
            for found in questioner.distinct(rng, kind, count)
        )
        if asked:  # a short document may state nothing that can be asked
            yield Document(f"register {found}", document.text, asked)
            found += 1
        if found == request.docs:
            return


REGISTER = register(
    Suite("register", "pocket's registers: direct, reverse and two-hop questions", "exact",
          documents)
)  # fmt: skip
