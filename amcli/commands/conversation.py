"""A conversation on a terminal: a panel, a prompt, streamed answers, and a few commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from amcli.console import Console, bytes_text, is_terminal, paint, printable, remark, report
from amcli.errors import AmkvError
from amcli.files import open_artifact

if TYPE_CHECKING:
    from rich.panel import Panel

    from amcli.pipeline.session import Session

_PROMPT = "> "
_WIDTH = 80

_HELP = """\
  /reset   start a new conversation about the same document
  /quit    leave (so does Ctrl-D)
  /help    this list
  Ctrl-C   stop an answer; at the prompt, twice to leave"""


def answer(session: Session, question: str) -> Iterator[str]:
    """The pieces of an answer, without white space before the first word and after the last."""
    held, begun = "", False
    for piece in session.ask(question):
        text = held + piece
        if not begun:
            text = text.lstrip()
        body = text.rstrip()
        held = text[len(body) :]
        if body:
            begun = True
            yield body


class Conversation:
    """Questions from the keyboard, answers to the screen, until the user leaves."""

    def __init__(self, console: Console, session: Session, paths: list[Path]):
        self._console = console
        self._session = session
        self._paths = paths
        self._commands: dict[str, Callable[[], bool]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/quit": lambda: False,
            "/exit": lambda: False,
        }

    def run(self) -> None:
        """Returns when the user leaves."""
        with suppress(ImportError):
            import readline  # noqa: F401 - importing it gives input() line editing and history
        if not self._console.quiet:
            self._show_panel()
        warned = False
        while True:
            try:
                line = _read_line().strip()
            except EOFError:
                remark("")
                return
            except KeyboardInterrupt:
                remark("")
                if warned:
                    return
                warned = True
                self._console.note("(Ctrl-C again or Ctrl-D to leave)")
                continue
            warned = False
            if line and not self._turn(line):
                return

    def _turn(self, line: str) -> bool:
        """One command or question; False when the user wants to leave."""
        if line in self._commands:
            return self._commands[line]()
        if line.startswith("/") and " " not in line:
            self._console.note(f"there is no command {printable(line)}; /help lists them")
            return True
        try:
            for piece in answer(self._session, line):
                self._console.data(printable(piece))
            self._console.data("\n")
        except KeyboardInterrupt:
            self._console.data("\n")
            self._console.note("(stopped)")
        except AmkvError as error:
            report(error)
        else:
            if self._session.tokens >= self._session.max_tokens:
                self._console.note(f"(cut off at --max-tokens {self._session.max_tokens})")
        return True

    def _help(self) -> bool:
        remark(_HELP)
        return True

    def _reset(self) -> bool:
        self._session.reset()
        self._console.note("(a new conversation)")
        return True

    def _show_panel(self) -> None:
        from rich.console import Console as Screen

        screen = Screen(stderr=True)
        screen.print(self._panel(min(screen.width, _WIDTH)))

    def _panel(self, width: int) -> Panel:
        """What is being talked about, in a few lines."""
        from rich.panel import Panel
        from rich.text import Text

        context = self._session.context
        loaded = context.loaded
        names = " + ".join(path.name for path in self._paths)
        facts = {
            "document": f"{context.source['name']}, {context.T:,} tokens",
            "context": f"{names}: {self._size(context.cache.nbytes())}",
            "model": f"{loaded.id} on {loaded.device}",
        }
        text = Text("\n", overflow="ellipsis", no_wrap=True).join(
            Text(f"{label:<10}{printable(value)}") for label, value in facts.items()
        )
        return Panel(text, width=width, subtitle="/help for commands, Ctrl-D to leave")

    def _size(self, held: int) -> str:
        """What the artifacts take in memory; of a single one, against what it would be."""
        if len(self._paths) > 1:
            return bytes_text(held)
        with open_artifact(self._paths[0]) as file:
            whole = file.kind == "prefill"
            against = "every key and value" if whole else f"{file.ratio:.1f}× smaller"
        return f"{bytes_text(held)}, {against}"


def _read_line() -> str:
    """A line from the keyboard; EOFError at its end."""
    if is_terminal(sys.stdout):
        return input(_PROMPT)  # through readline, which has to know the prompt
    sys.stderr.write(paint(_PROMPT, "2"))
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
