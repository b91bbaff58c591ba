"""A conversation on a terminal: a panel, a prompt, streamed answers, and slash commands."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from amcli.commands.failures import as_amkv_error
from amcli.commands.screen import console as output
from amcli.commands.screen.console import Console, ReaderGoneError, remark, report
from amcli.commands.screen.keyboard import Keyboard
from amcli.commands.screen.terminal import is_terminal, paint, printable, styled
from amcli.commands.slash import Slash, is_command, known, misspelt
from amcli.system.files import open_artifact
from amcli.system.units import bytes_text

if TYPE_CHECKING:
    from rich.panel import Panel

    from amcli.commands.comparison import Whole
    from amcli.pipeline.talk.session import Session, Turn

_WIDTH = 80

LOW = 1024
"""With fewer positions left than this, every answer says how many."""


def answer(session: Session, question: str) -> Generator[str, None, None]:
    """The pieces of an answer, without white space before the first word or after the last."""
    held, begun = "", False
    with closing(session.ask(question)) as pieces:
        for piece in pieces:
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

    def __init__(
        self, console: Console, session: Session, paths: list[Path], whole: Whole | None = None
    ):
        self._console = console
        self._session = session
        self._paths = paths
        self._whole = whole
        self._slash = Slash(console, session, paths, self.ask, self.show_panel)

    def run(self) -> None:
        """Runs until the user leaves."""
        keyboard = Keyboard(known())
        if not self._console.quiet:
            self.show_panel()
        warned = False
        try:
            while True:
                try:
                    text = keyboard.read()
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
                if text and not self._turn(text):
                    return
        finally:
            keyboard.close()

    def _turn(self, text: str) -> bool:
        """One command or question; False when the user wants to leave."""
        try:
            if (wrong := misspelt(text)) is not None:
                self._console.note(f"{wrong.message}; {wrong.hint}")
                return True
            if is_command(text):
                return self._slash.run(text)
            self.ask(text)
        except KeyboardInterrupt:
            self._console.note("(stopped)")
        except ReaderGoneError:
            raise
        except Exception as error:  # one failed answer must not end the conversation
            if output.switches.debug:
                traceback.print_exception(error)
            report(as_amkv_error(error))
        return True

    def ask(self, question: str) -> None:
        """Asks, and shows the answer as it comes, then its cost."""
        if self._whole is not None:
            self._whole.ask(self._console, self._session, question)
        else:
            turns = self._session.turns
            try:
                show(self._console, after_thoughts(answer(self._session, question), self._session))
            finally:
                if self._session.turns > turns:
                    self._foot(self._session.history[-1])
        left = self._left()
        if left is not None and left < min(LOW, self._session.max_tokens):
            self._console.note(
                f"{left:,} of the model's {self._session.positions:,} positions are left: "
                "/save the conversation, then /reset starts a new one"
            )

    def _foot(self, turn: Turn) -> None:
        """Tokens, speed and memory of an answer; why it was cut off, if it was."""
        held = bytes_text(self._session.cache.nbytes())
        facts = [f"{turn.tokens:,} tokens", f"{turn.speed:.3g} tokens/s", held]
        if turn.thoughts and not self._session.think:
            facts.append("thoughts hidden, --think shows them")
        left = self._left()
        if left is not None:
            facts.append(f"{left:,} positions left")
        self._console.note(paint("  " + " · ".join(facts), "2"))
        if turn.ended == "max-tokens":
            self._console.note(f"(cut off at --max-tokens {self._session.max_tokens})")
        elif turn.ended == "positions":
            self._console.note("(cut off: no positions are left)")

    def _left(self) -> int | None:
        limit = self._session.positions
        return None if limit is None else max(0, limit - self._session.length)

    def show_panel(self) -> None:
        """Shows what the conversation is about."""
        from rich.console import Console as Screen

        screen = Screen(stderr=True)
        screen.print(self._panel(min(screen.width, _WIDTH)))

    def _panel(self, width: int) -> Panel:
        from rich.panel import Panel
        from rich.text import Text

        context = self._session.context
        loaded = context.loaded
        names = " + ".join(path.name for path in self._paths)
        dtype = str(loaded.dtype).removeprefix("torch.")
        limit = self._session.positions
        of = "" if limit is None else f" of {limit:,}"
        facts = {
            "document": f"{context.source['name']}, {context.T:,} tokens",
            "context": f"{names}: {self._size(context.cache.nbytes())}",
            "model": f"{loaded.id} on {loaded.device}, {dtype}",
            "so far": f"{self._session.turns} questions, {self._session.length:,}{of} positions",
        }
        text = Text("\n", overflow="ellipsis", no_wrap=True).join(
            Text(f"{label:<10}{printable(value)}") for label, value in facts.items()
        )
        return Panel(text, width=width, subtitle="/help for commands, Ctrl-D to leave")

    def _size(self, held: int) -> str:
        """The memory the artifacts take; for a single one, also relative to the full cache."""
        if len(self._paths) > 1:
            return bytes_text(held)
        with open_artifact(self._paths[0]) as file:
            whole = file.kind == "prefill"
            against = "every key and value" if whole else f"{file.ratio:.1f}× smaller"
        return f"{bytes_text(held)}, {against}"


def after_thoughts(pieces: Iterator[str], session: Session) -> Iterator[str]:
    """The same pieces, after ending the line of thoughts: the answer starts on its own line."""
    if not session.think:
        return pieces
    first = next(pieces, "")
    remark("")
    return chain([first], pieces)


def show(console: Console, pieces: Iterator[str]) -> None:
    """Shows an answer on standard output: markdown on a terminal, plain text elsewhere."""
    if styled(sys.stdout):
        from amcli.commands.screen.streaming import StreamedMarkdown

        StreamedMarkdown().show(pieces)
        return
    safe, begun = is_terminal(sys.stdout), False
    try:
        for piece in pieces:
            begun = True
            console.data(printable(piece) if safe else piece)
    except BaseException:
        if begun:
            console.data("\n")
        raise
    console.data("\n")
