"""`qa`: a user's own documents and questions, with the answers they should get.

A file of JSON lines, one document per line:

    {"name": "report", "text": "…", "questions": [{"question": "…", "answer": "…"}]}

or `path` in place of `text`, relative to the file and of any kind that a prefill reads. Or a single
document, with a file of questions as `pipeline.talk.questions` reads it. A question without an
answer is measured on what the whole document answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amcli.errors import UsageError
from amcli.evaluation.suites.base import Document, Question, Suite, Wanted
from amcli.pipeline.contexts.source import STDIN, Source, read_source
from amcli.pipeline.talk.questions import asked, from_file, json_lines
from amcli.system.files import looks_like_artifact, read_text, unix_lines

KIND = "question"
"""The default kind of a question."""

_FORM = '{"name": "report", "text": "…", "questions": [{"question": "…", "answer": "…"}]}'


def documents(wanted: Wanted) -> Iterator[Document]:
    """The first `wanted.docs` documents, or all, each with its first `wanted.questions`."""
    if wanted.path is None:
        raise UsageError(
            "suite qa reads a file of documents and questions",
            _FORM,
            code="suite-wants-documents",
            field="path",
            suite="qa",
        )
    if wanted.asked is not None:
        yield _one(wanted.path, wanted.asked, wanted.questions)
        return
    if looks_like_artifact(wanted.path):
        raise UsageError(
            f"{wanted.path} is an artifact, not documents",
            f"one line each: {_FORM}",
            code="not-documents",
            field="path",
            path=wanted.path,
        )
    text = read_text(wanted.path, "convert it first")
    rows = list(json_lines(text, str(wanted.path), _FORM))
    if not rows:
        raise UsageError(
            f"{wanted.path} has no documents",
            f"one line each: {_FORM}",
            code="not-documents",
            field="path",
            path=wanted.path,
        )
    for where, row in rows[: wanted.docs or None]:
        yield _document(where, row, wanted.path.parent, wanted.questions)


def _one(path: Path, questions: Path, most: int | None) -> Document:
    """A single document with its file of questions."""
    if STDIN in (str(path), str(questions)):  # a resumed run has to read both again
        raise UsageError(
            "an evaluation reads files, not standard input",
            "name a file in place of -",
            code="stdin-not-taken",
            field="path",
        )
    source = read_source(str(path))
    found = []
    for number, q in enumerate(from_file(questions)[:most], 1):
        found.append(_question(f"question {number} of {questions}", q.text, q.given))
    return Document(source.name, source.text, tuple(found))


def _document(where: str, row: Any, folder: Path, most: int | None) -> Document:
    if not isinstance(row, dict):
        raise UsageError(
            f"{where} is no object", _FORM, code="not-documents", field="path", where=where
        )
    name, text, path = row.get("name"), row.get("text"), row.get("path")
    for field, value in (("name", name), ("text", text), ("path", path)):
        if not isinstance(value, str | None):
            raise UsageError(
                f"{where}: {field} is no string: {value!r:.40}",
                _FORM,
                code="not-documents",
                field="path",
                where=where,
            )
    if (text is None) == (path is None):
        which = "neither text nor path" if text is None else "both text and path"
        raise UsageError(
            f"{where} has {which}", _FORM, code="not-documents", field="path", where=where
        )
    if path is not None:
        source = _read(where, folder, path)
        name, text = name or source.name, source.text
    if not text or not text.strip():
        raise UsageError(
            f"{where}: the text is empty", _FORM, code="not-documents", field="path", where=where
        )
    questions = row.get("questions")
    if not isinstance(questions, list) or not questions:
        raise UsageError(
            f"{where} has no questions", _FORM, code="not-documents", field="path", where=where
        )
    found = []
    for number, value in enumerate(questions[:most], 1):
        place = f"{where}: question {number}"
        found.append(_question(place, asked(place, value).text, value))
    return Document(name or where.partition(" of ")[0], unix_lines(text), tuple(found))


def _read(where: str, folder: Path, path: str) -> Source:
    """The document at a path relative to the file's folder."""
    try:
        return read_source(os.path.join(folder, path))  # here `-` is an ordinary file name
    except UsageError as error:
        raise error.at(where) from error


def _question(where: str, text: str, given: Any) -> Question:
    """The question to ask; `given` may be an object with `answer` and `kind`."""
    given = given if isinstance(given, dict) else {}
    answer, kind = given.get("answer"), given.get("kind")
    for field, value in (("answer", answer), ("kind", kind)):
        if not isinstance(value, str | None):
            raise UsageError(
                f"{where}: its {field} is no string: {value!r:.40}",
                _FORM,
                code="not-documents",
                field="path",
                where=where,
            )
    return Question(text, (answer or "").strip(), kind or KIND)


QA = Suite(
    "qa",
    "none",
    documents,
    docs=0,
    tokens=0,
    whole=True,
    own=True,
)
