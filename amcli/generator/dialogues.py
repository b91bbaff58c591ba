"""Questions about a generated document, and the dialogues that pocket is trained on.

Three kinds of question: `direct` (from the subject to the value), `reverse` (from the value to
the subject) and `two-hop` (a fact about somebody described by another fact). Only questions with
exactly one right answer in the document are asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from amcli.generator.documents import Document, Fact
from amcli.pipeline.queries.prompts import ASK

QUESTION_KINDS = ("direct", "reverse", "two-hop")

_READ = ("I have read it.", "Noted.", "Thank you, I have read the document.", "Understood.")


@dataclass(frozen=True)
class Question:
    """A question with its one right answer, word for word."""

    question: str
    answer: str
    kind: str


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


Hop = tuple[Fact, tuple[str, ...], Fact]
"""`(known fact, wordings of the description it gives, fact asked for)`."""


def direct_about(fact: Fact, rng: Random) -> Question:
    """A question from the fact's subject to its value."""
    wording = rng.choice(fact.attribute.direct)
    return Question(wording.format(s=fact.subject), fact.value, "direct")


def reverse_about(fact: Fact, rng: Random) -> Question:
    """A question from the fact's value to its subject; the attribute must have such a question."""
    wording = rng.choice(fact.attribute.reverse)
    return Question(wording.format(v=fact.value), fact.subject, "reverse")


def two_hop_about(hop: Hop, rng: Random) -> Question:
    """A question for a fact about whoever another fact describes; the answer names them first."""
    known, wordings, asked = hop
    description = rng.choice(wordings).format(s=known.subject, v=known.value)
    question = rng.choice(asked.attribute.hop).format(r=description)
    answer = _capital(asked.attribute.statement.format(s=asked.subject, v=asked.value))
    return Question(question, answer, "two-hop")


class Questioner:
    """Draws questions about one document from its facts.

    facts       facts whose subject has one value for the attribute, for direct questions
    unique      those of `facts` whose value belongs to only one subject
    reversible  those of `unique` that have a reverse question
    hops        for two-hop questions
    """

    def __init__(self, document: Document):
        subjects: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        values: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        for fact in document.facts:
            subjects[fact.subject, fact.attribute.name].append(fact)
            values[fact.attribute.name, fact.value].append(fact)
        self.facts = [f for f in document.facts if len(subjects[f.subject, f.attribute.name]) == 1]
        self.unique = [f for f in self.facts if len(values[f.attribute.name, f.value]) == 1]
        self.reversible = [f for f in self.unique if f.attribute.reverse]
        self.by_subject: dict[str, list[Fact]] = defaultdict(list)
        for fact in self.facts:
            self.by_subject[fact.subject].append(fact)
        self.hops = list(self._hops())

    def _hops(self) -> Iterator[Hop]:
        for known in self.facts:
            if known.attribute.described:  # "the contact for the Osprey service"
                for asked in self.by_subject.get(known.value, ()):
                    if asked.attribute.hop:
                        yield known, known.attribute.described, asked
        for known in self.unique:
            if known.attribute.relative:
                for asked in self.by_subject[known.subject]:
                    if asked is not known and asked.attribute.hop:
                        yield known, known.attribute.relative, asked

    def direct(self, rng: Random) -> Question | None:
        """A question from the subject to the value, or None if there is none."""
        if not self.facts:
            return None
        return direct_about(rng.choice(self.facts), rng)

    def reverse(self, rng: Random) -> Question | None:
        """A question from the value to the subject, or None if there is none."""
        if not self.reversible:
            return None
        return reverse_about(rng.choice(self.reversible), rng)

    def two_hop(self, rng: Random) -> Question | None:
        """A question for a fact about somebody described by another fact, or None."""
        if not self.hops:
            return None
        return two_hop_about(rng.choice(self.hops), rng)

    def draw(self, rng: Random, kind: str) -> Question | None:
        """A question of `kind` ("direct", "reverse" or "two-hop"), or None if there is none."""
        return {"direct": self.direct, "reverse": self.reverse, "two-hop": self.two_hop}[kind](rng)

    def distinct(self, rng: Random, kind: str, count: int) -> list[Question]:
        """Up to `count` different questions of one kind."""
        found: dict[str, Question] = {}
        for _ in range(count * 8):
            question = self.draw(rng, kind)
            if question is None or len(found) == count:
                break
            found.setdefault(question.question, question)
        return list(found.values())


@dataclass(frozen=True)
class Turn:
    """What the user says and what the model should say, with the loss weight.

    `ends` is False if the answer is cut off before its end (repetition of a part).
    """

    user: str
    assistant: str
    weight: float
    kind: str
    ends: bool = True


ANSWER_WEIGHT = 16.0
REPEAT_WEIGHT = 1.0
ASK_WEIGHT = 2.0


def turns(document: Document, rng: Random) -> Iterator[Turn]:
    """Turns of a dialogue about a document: endless, as long as it has facts."""
    questioner = Questioner(document)
    if not questioner.facts:
        return
    if rng.random() < 0.25:
        yield Turn("", rng.choice(_READ), 1.0, "read")
    while True:
        if rng.random() < 0.08:
            asked = questioner.draw(rng, rng.choice(QUESTION_KINDS))
            if asked is not None:
                yield Turn(ASK, asked.question, ASK_WEIGHT, "ask")
        question = questioner.draw(rng, rng.choices(QUESTION_KINDS, (35, 35, 30))[0])
        if question is not None:
            yield Turn(question.question, question.answer, ANSWER_WEIGHT, question.kind)
