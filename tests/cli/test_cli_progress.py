"""Progress: drawn on terminals only, with what is done, the time left and the memory."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable

import pytest

from amcli.commands.screen import console as output
from amcli.commands.screen.bar import Bar, memory
from amcli.commands.screen.console import Console
from amcli.system.progress import Silent


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Puts a terminal in place of stderr: in the test itself, as pytest sets streams in between."""
    monkeypatch.setattr(output, "switches", output.Switches())
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("LINES", "24")):
        monkeypatch.setenv(name, value)

    def make() -> Terminal:
        found = Terminal()
        monkeypatch.setattr(sys, "stderr", found)
        return found

    return make


def drawn(terminal: Terminal) -> list[str]:
    """Everything that was ever drawn, a line each, without colours."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]", plain) if line.strip()]


def test_a_stage_with_an_end_and_one_without(screen: Callable[[], Terminal]) -> None:
    terminal = screen()
    with Console().progress() as progress:
        progress.start("prefill", 4096)
        progress.advance(1024)
    counted = drawn(terminal)[-1]
    assert re.match(r"prefill +\S+ 1,024/4,096 .*s.* [0-9.]+ [kMG]B$", counted)
    with Console().progress() as progress:
        progress.start("load the model", 0)
    endless = drawn(terminal)[-1]
    assert re.match(r"load the model +\S+ +[0-9.]+ s [0-9.]+ [kMG]B$", endless)
    assert max(map(len, drawn(terminal))) <= 80


def test_results_are_not_drawn_with_the_bar(
    screen: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that goes to a file while the bar is on the terminal goes to that file alone."""
    terminal = screen()
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with Bar() as bar:
        bar.start("answer", 2)
        Console().record({"answer": "yes"})
    assert file.getvalue() == '{"answer": "yes"}\n'
    assert "yes" not in terminal.getvalue()


def test_pipes_quiet_and_dumb_terminals_see_nothing(
    screen: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = screen()
    with Console().progress() as progress:
        assert isinstance(progress, Bar)
    before = terminal.getvalue()
    with Console(quiet=True).progress() as progress:
        assert isinstance(progress, Silent)
    monkeypatch.setattr(output, "switches", output.Switches())
    monkeypatch.setenv("TERM", "dumb")
    with Console().progress() as progress:
        assert isinstance(progress, Silent)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Console().progress() as progress:
        assert isinstance(progress, Silent)
    assert terminal.getvalue() == before


def test_memory_is_what_the_process_holds() -> None:
    number, unit = (memory() or "0 B").split()[:2]
    assert float(number) > 0 or sys.platform != "linux"
    assert unit in ("B", "MB", "GB")
