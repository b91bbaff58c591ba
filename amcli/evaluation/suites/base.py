"""What a suite is: documents with questions, from a seed or from a published file.

To add one, write a small module with a `Suite`, and name it in `evaluation.catalogue`. Knows
nothing of models: lengths are measured by a `Measure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from amcli.errors import UsageError, did_you_mean
from amcli.evaluation.catalogue import SUITES

Scorer = Literal["exact", "substring", "letter", "reasoned", "none"]
"""How an answer becomes a score in [0, 1]; see `amcli.evaluation.scorers`."""


@dataclass(frozen=True)
class Question:
    """One question about a document.

    text        what the user says or, for a continuation, the text that follows the document
    answer      the right answer, word for word: likelihoods are measured on it; empty for the
                whole document's own answer, if a suite asks for that
    kind        results are also reported by kind
    references  strings that a generated answer has to contain
    options     the letters of a multiple choice, in order
    said        what the user says instead of `text` when an answer is generated
    max_tokens  longest generated answer
    """

    text: str
    answer: str
    kind: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    said: str | None = None
    max_tokens: int = 64
    continuation: bool = False


@dataclass(frozen=True)
class Document:
    """A text, the name it is reported by, and its questions."""

    name: str
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Measure:
    """Lengths in the model's own tokens: `count` takes many texts at once."""

    count: Callable[[Sequence[str]], list[int]]

    def one(self, text: str) -> int:
        """Tokens of one text."""
        return self.count([text])[0]

    def cut(self, text: str, tokens: int) -> str:
        """The longest start of `text` that ends with a word and has at most `tokens` tokens."""
        ends = [i for i in range(1, len(text)) if text[i].isspace() and not text[i - 1].isspace()]
        ends.append(len(text))
        low, high = 0, len(ends)  # ends[:low] fit, ends[high:] do not
        while low < high:
            middle = (low + high) // 2
            if self.one(text[: ends[middle]]) <= tokens:
                low = middle + 1
            else:
                high = middle
        return text[: ends[low - 1]] if low else ""


@dataclass(frozen=True)
class Wanted:
    """What a suite is asked to make.

    docs       number of documents, of each sort if a suite has several; 0: all there are
    questions  questions of each kind about a document; None: the suite's own number
    tokens     length of a document
    path       the published file or the text, for suites that read one
    asked      a file of questions about the text at `path`
    reason     multiple choice with a short thought before the letter
    """

    docs: int
    questions: int | None
    tokens: int
    seed: int
    measure: Measure
    path: Path | None = None
    asked: Path | None = None
    reason: bool = False


@dataclass(frozen=True)
class Suite:
    """A source of documents with questions.

    docs, tokens  default number of documents, and their length
    file          what the file has to be; None for a suite that takes none
    whole         documents keep their own length: `tokens` cannot be chosen
    choice        multiple choice
    own           the whole document's own answers are measured too, and generated answers are
                  compared with the right ones
    """

    name: str
    scorer: Scorer
    make: Callable[[Wanted], Iterable[Document]]
    docs: int = 8
    tokens: int = 2048
    whole: bool = False
    choice: bool = False
    own: bool = False

    @property
    def file(self) -> str | None:
        """What the FILE argument has to be; None for a suite that takes none."""
        return SUITES[self.name].file

    def documents(self, wanted: Wanted) -> list[Document]:
        """The documents, each with at least one question. Raises UsageError for none at all."""
        found = [document for document in self.make(wanted) if document.questions]
        if not found:
            raise UsageError(
                f"suite {self.name} has no document with questions at {wanted.tokens} tokens",
                "raise tokens",
                code="tokens-too-few",
                field="tokens",
                tokens=wanted.tokens,
            )
        return found


def get(name: str) -> Suite:
    """The suite of that name. Raises UsageError with the nearest name and the list."""
    if name not in SUITES:
        meant = did_you_mean(name, SUITES)
        raise UsageError(
            f"unknown suite {name!r}",
            f"{meant}suites: {', '.join(SUITES)}",
            code="unknown-suite",
            field="suite",
            suite=name,
        )
    module, _, attribute = SUITES[name].place.partition(":")
    found: Suite = getattr(import_module(f"amcli.evaluation.suites.{module}"), attribute)
    return found
