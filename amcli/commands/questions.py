"""Questions that do not come from a conversation: -p, standard input, and files of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amcli.console import is_terminal, remark
from amcli.errors import UsageError
from amcli.files import read_text
from amcli.pipeline.source import STDIN


@dataclass(frozen=True)
class Asked:
    """A question; `given` is the object of the file that it comes from."""

    text: str
    given: dict[str, Any] | None = None


def prompts(given: Sequence[str]) -> list[Asked]:
    """The questions of -p; `-` stands for standard input, once."""
    if list(given).count(STDIN) > 1:
        raise UsageError("-p - was given twice", "standard input can be read once")
    return [Asked(_prompt(text)) for text in given]


def _prompt(prompt: str) -> str:
    if prompt == STDIN and is_terminal(sys.stdin):
        remark("type the question; Ctrl-D ends it")
    try:
        text = prompt if prompt != STDIN or sys.stdin is None else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError("the question is not UTF-8 text", "convert it first") from error
    if not text.strip():
        raise UsageError("the question is empty", 'ask one: -p "Who wrote this?"')
    return text.strip()


def lines() -> Iterator[Asked]:
    """The questions on standard input: every line that is not empty."""
    asked = False
    try:
        for line in sys.stdin or ():
            if line.strip():
                asked = True
                yield Asked(line.strip())
    except UnicodeDecodeError as error:
        raise UsageError("a question is not UTF-8 text", "convert it first") from error
    if not asked:
        raise UsageError("no question was given", 'add -p "…", or pipe questions in')


def from_file(path: Path) -> list[Asked]:
    """The questions of a JSONL file, or of standard input for `-`, all of them checked.

    Raises UsageError that names the first line which is neither a string nor an object with a
    `question`, and for a file that cannot be read.
    """
    name = "standard input" if str(path) == STDIN else str(path)
    text = _piped(name) if str(path) == STDIN else read_text(path, "convert it first")
    rows = [(n, row) for n, row in enumerate(text.split("\n"), 1) if row.strip()]
    if not rows:
        raise UsageError(f"{name} has no questions", _FORM)
    return [_row(f"line {number} of {name}", row) for number, row in rows]


def _piped(name: str) -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text", "convert it first") from error


_FORM = 'one JSON object a line: {"question": "Who wrote this?"}'


def _row(where: str, row: str) -> Asked:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        shown = row.strip() if len(row.strip()) <= 40 else row.strip()[:39] + "…"
        raise UsageError(f"{where} is not JSON: {shown}", _FORM) from error
    question = value.get("question") if isinstance(value, dict) else value
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"{where} has no question", _FORM)
    return Asked(question.strip(), value if isinstance(value, dict) else None)
