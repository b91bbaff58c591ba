"""`chat --compare`: the same question to a context and the whole document, side by side."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amcli.commands.screen.console import Console
from amcli.commands.screen.terminal import printable, styled
from amcli.system.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from amcli.pipeline.talk.session import Session, Turn

_WIDEST = 120


@dataclass
class Whole:
    """A second conversation, with every key and value of the same tokens.

    seconds  time it took to read them again
    """

    session: Session
    seconds: float

    def ask(self, console: Console, session: Session, question: str) -> None:
        """Asks both, and shows both answers with their cost."""
        with console.progress() as progress:
            progress.start("answer twice", 2)
            small, large = self.answer(session, question, progress.advance)
        self.show(console, session, small, large)

    def answer(self, session: Session, question: str, advance: Any = None) -> tuple[Turn, Turn]:
        """The turns of both; an interrupt takes both back."""
        self._follow(session)
        turns = session.turns
        try:
            for each in (session, self.session):
                for _ in each.ask(question):
                    pass
                if advance is not None:
                    advance()
        except BaseException:
            if session.turns > turns:
                session.undo()
            self._follow(session)
            raise
        return session.history[-1], self.session.history[-1]

    def _follow(self, session: Session) -> None:
        """Takes back turns that were taken back in `session`, and adopts its settings."""
        while self.session.turns > session.turns:
            self.session.undo()
        for name in ("system", "temperature", "max_tokens", "seed"):
            setattr(self.session, name, getattr(session, name))

    def show(self, console: Console, session: Session, small: Turn, large: Turn) -> None:
        """Shows the answers in two columns on a terminal, elsewhere one below the other."""
        titles = [
            f"compact: {_cost(session, small)}",
            f"whole document: {_cost(self.session, large)}",
        ]
        said = [printable(turn.answer) for turn in (small, large)]
        if not styled(sys.stdout):
            for title, text in zip(titles, said, strict=True):
                console.data(f"{title}\n{text}\n")
            return
        from rich.console import Console as Screen
        from rich.table import Table
        from rich.text import Text

        screen = Screen(file=sys.stdout)
        table = Table(width=min(screen.width, _WIDEST), pad_edge=False)
        for title in titles:
            table.add_column(Text(title), ratio=1, overflow="fold")
        table.add_row(*map(Text, said))
        screen.print(table)

    def record(self, large: Turn) -> dict[str, Any]:
        """The whole document's answer for --json."""
        return {
            "answer": large.answer,
            "tokens": large.tokens,
            "seconds": round(large.seconds, 3),
            "memory_bytes": self.session.cache.nbytes(),
            "read_seconds": round(self.seconds, 3),
        }


def _cost(session: Session, turn: Turn) -> str:
    return f"{bytes_text(session.cache.nbytes())}, {seconds_text(turn.seconds)}"
