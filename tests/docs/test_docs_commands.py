"""Commands that the documentation shows are run, or say why not and are checked for their options.

One folder for all pages: each distinct command is run once, with a small document as `doc.txt`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from shown import ROOT, Shown, check_options, fences, pages, run, shown, variables, words_of

from amcli.generator.documents import generate
from amcli.matching import methods

COMMANDS = shown()
METHOD = "with the method above"
BY_CI = ("demo", "tests")
"""Marks of the two commands of the README that continuous integration runs as they stand."""


def tools(command: Shown) -> Iterator[list[str]]:
    for pipe in words_of(command.text):
        for words in pipe:
            yield variables(words)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with what the pages take for granted."""
    found = tmp_path_factory.mktemp("docs")
    text = generate(7, 120).text
    (found / "doc.txt").write_text(text, encoding="utf-8")
    (found / "report.html").write_text(f"<h1>Report</h1><p>{text[:300]}</p>", encoding="utf-8")
    (found / "notes.md").write_text("# Notes\n\nNone.", encoding="utf-8")
    (found / "appendix.txt").write_text(text[:300], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found)
        for name in [name for name in os.environ if name.startswith("AMKV_")]:
            patch.delenv(name)
        patch.setenv("XDG_CONFIG_HOME", str(found / ".config"))
        patch.setenv("XDG_STATE_HOME", str(found / ".state"))
        yield found


def to_run(mark: str | None) -> list[Shown]:
    """Distinct commands in `sh` fences with that mark, in the order of the pages."""
    chosen: dict[str, Shown] = {}
    for command in COMMANDS:
        if command.fenced and command.mark == mark:
            chosen.setdefault(command.text.partition("#")[0].strip(), command)
    return list(chosen.values())


def test_every_command_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = to_run(None)
    assert len(found) >= 8
    for command in found:
        run(command, monkeypatch)


def test_the_method_of_contributing_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would write it: the page's own lines, run as a module."""
    (_, source, _), *others = fences("docs/contributing.md", "python")
    assert not others
    exec(compile(source, "value_norm.py", "exec"), {"__name__": "value_norm"})
    try:
        for command in to_run(METHOD):
            run(command, monkeypatch)
    finally:
        methods.unregister("value-norm")


@pytest.mark.slow
def test_slow_commands_are_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in to_run("slow"):
        run(command, monkeypatch)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_options_are_those_that_there_are(command: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in tools(command):
        if words[:1] == ["torchrun"]:
            words = words[words.index("amkv") :]
        if words[:1] == ["amkv"]:
            check_options(words)
        elif words[:1] == ["python"] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file()
    if command.mark is not None and command.mark not in ("slow", METHOD, *BY_CI):
        assert command.mark.startswith("not run: "), f"{command}: what does the mark say?"


def test_no_page_says_what_it_does_not_mean() -> None:
    """A fence without a kind is a command that no test would see."""
    for page in pages():
        for line, body, _ in fences(page, ""):
            assert not body.startswith("amkv "), f"{page}:{line}: say sh or text"
