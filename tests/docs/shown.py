"""The commands that the documentation shows: where they are, and a shell small enough to run them.

In this process, so that PyTorch is loaded once. The shell knows `amkv`, `cat`, `cp`, `echo`, pipes,
variables before a command, and comments; documentation that needs more says that it is not run.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from amcli.commands.app import app, main

ROOT = Path(__file__).parents[2]
FIRST = ("docs/quickstart.md", "README.md")
"""Pages whose commands make what those of others use."""

_FENCE = re.compile(
    r"^(?: *<!-- (?P<mark>[^\n]*?) -->\n)? *```(?P<kind>\w*)\n(?P<body>.*?)^ *```$", re.M | re.S
)
_INDENTED = re.compile(r"^ {4,}((?:\w+=\S+ )*amkv (?:[^\n\\]|\\\n)*)$", re.M)


@dataclass(frozen=True)
class Shown:
    """A command line of a page; `mark` is the comment before its fence, or None."""

    page: str
    line: int
    text: str
    mark: str | None
    fenced: bool = True

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[str]:
    """All pages, those that others build on first."""
    found = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "formats").glob("*.md")]
    names = sorted(str(path.relative_to(ROOT)) for path in found)
    return [*FIRST, *(name for name in names if name not in FIRST)]


def fences(page: str, kind: str) -> Iterator[tuple[int, str, str | None]]:
    """The fences of a kind: line of the first command, what is in it, the comment before it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        if match["kind"] == kind:
            yield text.count("\n", 0, match.start("body")) + 1, match["body"], match["mark"]


def shown() -> list[Shown]:
    """Every command of every page."""
    found = []
    for page in pages():
        for line, body, mark in fences(page, "sh"):
            if page.startswith("docs/benchmarks/"):
                mark = mark or "not run: repeats a benchmark, which takes minutes to hours"
            found += [Shown(page, line + i, text, mark) for i, text in _lines(body)]
        text = (ROOT / page).read_text(encoding="utf-8")
        if page != "docs/cli.md":  # the examples of --help
            text = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
        for match in _INDENTED.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            joined = re.sub(r"\\\n\s*", "", match[1])
            found.append(Shown(page, line, joined, None, fenced=False))
    return found


def _lines(body: str) -> Iterator[tuple[int, str]]:
    """Command lines with those that a backslash ends joined to the next."""
    held, first = "", 0
    for i, line in enumerate(body.splitlines()):
        first = first if held else i
        held += line.strip()
        if held.endswith("\\"):
            held = held[:-1]
            continue
        if held and not held.startswith("#"):
            yield first, held
        held = ""


def words_of(text: str) -> list[list[list[str]]]:
    """Commands joined by `&&`, each a pipe of commands, each of words without redirections."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    commands: list[list[list[str]]] = [[[]]]
    for word in lexer:
        if word in (">", "<"):
            next(lexer, None)  # a file, which is no word of the command
        elif word == "&&":
            commands.append([[]])
        elif word == "|":
            commands[-1].append([])
        else:
            commands[-1][-1].append(word)
    return commands


def variables(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The variables set before a command, and the command."""
    values = {}
    while words and re.match(r"^[A-Z_]+=", words[0]):
        name, _, values_text = words[0].partition("=")
        values[name] = values_text
        words = words[1:]
    return values, words


def check_options(words: list[str]) -> None:
    """Raises what the command line raises for options or values that it does not take."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = next((word for word in words[1:] if not word.startswith("-")), None)
    if name is None:
        return
    assert name in commands, f"there is no command {name}"
    rest = words[words.index(name) + 1 :]
    commands[name].make_context(name, rest)


def run(command: Shown, patch: pytest.MonkeyPatch) -> None:
    """Runs a command line in the current folder; fails when a command of it does."""
    assert not {">", "<"} & set(command.text), f"{command}: the tests know no redirections"
    for pipe in words_of(command.text):
        data = b""
        for words in pipe:
            values, words = variables(words)
            with patch.context() as inner:
                for name, value in values.items():
                    inner.setenv(name, value)
                data = _run_one(command, words, data, inner)


def _run_one(command: Shown, words: list[str], data: bytes, patch: pytest.MonkeyPatch) -> bytes:
    name, *rest = words
    if name == "echo":
        return (" ".join(rest) + "\n").encode()
    if name == "cat":
        return b"".join(Path(path).read_bytes() for path in rest)
    if name == "cp":
        shutil.copy(*rest)
        return b""
    assert name == "amkv", f"{command}: the tests cannot run {name}; say why it is not run"
    out, err = io.StringIO(), io.StringIO()
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    patch.setattr(os, "environ", os.environ)
    with redirect_stdout(out), redirect_stderr(err):
        code = main(rest)
    assert code == 0, f"{command}\n{err.getvalue()}"
    return out.getvalue().encode()
