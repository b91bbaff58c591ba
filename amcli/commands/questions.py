"""Questions from outside a conversation: -p and standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from amcli.commands.screen.console import remark
from amcli.commands.screen.terminal import is_terminal
from amcli.errors import UsageError
from amcli.pipeline.contexts.source import STDIN
from amcli.pipeline.talk.questions import Asked


def prompts(given: Sequence[str]) -> list[Asked]:
    """The questions given with -p; `-` stands for standard input, and may appear once."""
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
    """The questions on standard input: every non-empty line."""
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
