"""Files of questions: JSON lines, each a string or an object with a `question`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amcli.errors import UsageError
from amcli.pipeline.contexts.source import STDIN
from amcli.system.files import read_text, unix_lines


@dataclass(frozen=True)
class Asked:
    """A question; `given` is the object in the file that it comes from."""

    text: str
    given: dict[str, Any] | None = None


def from_file(path: Path) -> list[Asked]:
    """The questions in a JSONL file, or standard input for `-`, all checked.

    Raises UsageError that names the first line that is neither a string nor an object with a
    `question`, and for a file that cannot be read.
    """
    name = "standard input" if str(path) == STDIN else str(path)
    text = _piped(name) if str(path) == STDIN else read_text(path, "convert it first")
    found = list(json_lines(text, name, _FORM))
    if not found:
        raise UsageError(
            f"{name} has no questions", _FORM, code="no-questions", field="path", path=name
        )
    return [asked(where, value) for where, value in found]


def json_lines(text: str, name: str, form: str) -> Iterator[tuple[str, Any]]:
    """The values of JSON lines, each with its place in words; empty lines are skipped.

    Raises UsageError for a line that is not JSON, with the `form` it should have.
    """
    for number, row in enumerate(unix_lines(text).split("\n"), 1):
        where, shown = f"line {number} of {name}", row.strip()
        if not shown:
            continue
        try:
            yield where, json.loads(shown)
        except (ValueError, RecursionError) as error:
            shown = shown if len(shown) <= 40 else shown[:39] + "…"
            raise UsageError(
                f"{where} is not JSON: {shown}", form, code="not-json", field="path", where=where
            ) from error


def _piped(name: str) -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 text",
            "convert it first",
            code="not-text",
            field="path",
            path=name,
        ) from error


_FORM = 'one JSON object a line: {"question": "Who wrote this?"}'


def asked(where: str, value: Any) -> Asked:
    """A question from a string or an object with a `question`; UsageError names its place."""
    question = value.get("question") if isinstance(value, dict) else value
    if not isinstance(question, str) or not question.strip():
        raise UsageError(
            f"{where} has no question", _FORM, code="question-missing", field="path", where=where
        )
    return Asked(question.strip(), value if isinstance(value, dict) else None)
