"""`quality` and `longhealth`: multiple choice about published documents, from a user's file.

QuALITY (Pang et al., arXiv 2112.08608): the JSON lines `QuALITY.v1.0.1.htmlstripped.dev`, one
line per article and writer; lines of one article are joined. LongHealth (Adams et al., arXiv
2401.14490): the object `benchmark_v5.json`; as in the paper on Attention Matching (arXiv
2602.16284, public code) patients are taken in order, five to a document, each note between tags
with its name, and each question says which patient it is about.

Options are lettered below the question. By default the model's answer is the letter it gives
the highest likelihood, which is exact and cheap. With `reason` it is as in the paper: the model
thinks briefly and then writes a letter, and the last letter that stands alone counts (greedy
here, sampled there). A question is never scored against another question's options.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from amcli.errors import UsageError
from amcli.evaluation.suites.base import Document, Question, Suite, Wanted
from amcli.system.files import read_text

_INSTEAD = "give the published file itself"

LETTERS = "ABCDEFGHIJ"
PATIENTS = 5
"""Patients per LongHealth document."""

REASON_TOKENS = 1024
_ONLY = "Answer with the letter ({letters}) of the right option only."
_REASON = (
    "Think about it step by step, very briefly. Then, on a new line, write only the letter "
    "({letters}) of the right option. If you are not sure, make a guess."
)


def question(text: str, options: Sequence[str], right: int, kind: str, reason: bool) -> Question:
    """A multiple-choice question; `right` counts from 0."""
    letters = LETTERS[: len(options)]
    listed = "\n".join(f"{letter}. {o.strip()}" for letter, o in zip(letters, options, strict=True))
    body = f"{text.strip()}\n\n{listed}\n\n"
    names = f"{', '.join(letters[:-1])} or {letters[-1]}"
    return Question(
        body + _ONLY.format(letters=names),
        letters[right],
        kind,
        references=(letters[right],),
        options=tuple(letters),
        said=body + _REASON.format(letters=names) if reason else None,
        max_tokens=REASON_TOKENS,
    )


def quality(wanted: Wanted) -> Iterator[Document]:
    """The first `wanted.docs` articles; kinds `easy` and `hard` by the annotators."""
    path = _path(wanted, "quality")
    articles: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for number, line in enumerate(read_text(path, _INSTEAD).splitlines(), 1):
        if line.strip():
            with _Form(path, f"line {number}", "QuALITY"):
                entry = json.loads(line)
                key = (str(entry["article_id"]), str(entry["article"]).strip())
                articles.setdefault(key, []).extend(entry["questions"])
    for (name, text), asked in list(articles.items())[: wanted.docs]:
        with _Form(path, f"article {name}", "QuALITY"):
            questions = [
                question(
                    q["question"],
                    q["options"],
                    _right(int(q["gold_label"]) - 1, len(q["options"])),
                    "hard" if q["difficult"] else "easy",
                    wanted.reason,
                )
                for q in asked[: wanted.questions]
            ]
        yield Document(f"article {name}", text, tuple(questions))


def longhealth(wanted: Wanted) -> Iterator[Document]:
    """The first `wanted.docs` groups of five patients (the last one may be smaller)."""
    path = _path(wanted, "longhealth")
    with _Form(path, "the file", "LongHealth"):
        patients = sorted(dict(json.loads(read_text(path, _INSTEAD))).items())
    groups = [patients[i : i + PATIENTS] for i in range(0, len(patients), PATIENTS)]
    for group in groups[: wanted.docs]:
        notes: list[str] = []
        questions: list[Question] = []
        for name, patient in group:
            with _Form(path, name, "LongHealth"):
                notes += [f"<{k}>\n{v.strip()}\n</{k}>" for k, v in patient["texts"].items()]
                asked = patient["questions"][: wanted.questions]
                questions += [_about(name, patient, q, wanted.reason) for q in asked]
        title = " to ".join(dict.fromkeys((group[0][0], group[-1][0])))
        yield Document(title, "\n\n".join(notes), tuple(questions))


def _about(name: str, patient: Mapping[str, Any], asked: Mapping[str, Any], reason: bool) -> Any:
    known = [f"ID {name}"]
    for key in ("name", "birthday", "diagnosis"):
        if patient.get(key):
            known.append(f"{key}: {patient[key]}")
    options = [str(asked[f"answer_{letter}"]) for letter in "abcde"]
    right = [option.strip() for option in options].index(str(asked["correct"]).strip())
    text = f"A question about this patient: {', '.join(known)}.\n\n{asked['question']}"
    return question(text, options, right, "all questions", reason)


def _right(index: int, count: int) -> int:
    if not 0 <= index < count:
        raise ValueError(f"the right option is number {index + 1} of {count}")
    return index


def _path(wanted: Wanted, suite: str) -> Path:
    if wanted.path is None:
        raise UsageError(
            f"suite {suite} reads a published file",
            "name it, or see docs/eval.md",
            code="suite-wants-file",
            field="path",
            suite=suite,
        )
    return wanted.path


class _Form:
    """Reports the place where a file does not have the published form."""

    def __init__(self, path: Path, place: str, benchmark: str):
        self.path, self.place, self.benchmark = path, place, benchmark

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: object) -> None:
        if isinstance(error, (ValueError, KeyError, TypeError, AttributeError, IndexError)):
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(
                f"{self.path} has not the form of {self.benchmark}: {self.place}: {what}",
                "give the published file, unchanged; docs/eval.md says which",
                code="not-of-the-benchmark",
                field="path",
                path=self.path,
                benchmark=self.benchmark,
            ) from error


QUALITY = Suite(
    "quality",
    "letter",
    quality,
    docs=50,
    tokens=0,
    whole=True,
    choice=True,
)

LONGHEALTH = Suite(
    "longhealth",
    "letter",
    longhealth,
    docs=4,
    tokens=0,
    whole=True,
    choice=True,
)
