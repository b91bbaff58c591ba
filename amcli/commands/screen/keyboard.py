"""Lines from the keyboard: editing, a saved history, and multi-line texts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from amcli.commands.screen.terminal import is_terminal, paint
from amcli.system.memory import state_folder

PROMPT = "> "
_MORE = "… "
_FENCE = '"""'
_KEPT = 1000
"""Lines of history kept from one conversation to the next."""


class Keyboard:
    """Reads what the user types, through readline where there is one.

    words  what Tab completes at the beginning of a line
    """

    def __init__(self, words: Iterable[str]):
        self._words = sorted(words)
        self._history: Path | None = None
        with suppress(RuntimeError):  # no home folder
            self._history = state_folder() / "chat-history"
        # input() uses readline only on a terminal, and readline has to know the prompt.
        self._edits = is_terminal(sys.stdin) and is_terminal(sys.stdout)
        self._readline = _readline() if self._edits else None
        if self._readline is not None:
            self._readline.set_completer(self._complete)
            self._readline.set_completer_delims(" ")
            old = "libedit" in (self._readline.__doc__ or "")
            self._readline.parse_and_bind("bind ^I rl_complete" if old else "tab: complete")
            # Python turns this off; with it, pasted text is one question, not one per line.
            self._readline.parse_and_bind("set enable-bracketed-paste on")
            self._readline.set_history_length(_KEPT)
            if self._history is not None:
                with suppress(OSError):
                    self._readline.read_history_file(self._history)

    def close(self) -> None:
        """Saves the history, readable only by its owner."""
        if self._readline is None or self._history is None:
            return
        with suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))
            self._readline.write_history_file(self._history)

    def read(self) -> str:
        """A line, or several: a line that ends in a backslash continues on the next one, and lines
        between triple quotes belong together. Raises EOFError at the end."""
        text = self._line(PROMPT).strip()
        if text.startswith(_FENCE):
            lines = [text.removeprefix(_FENCE)]
            while not lines[-1].rstrip().endswith(_FENCE):
                lines.append(self._line(_MORE))
            return "\n".join(lines).rstrip().removesuffix(_FENCE).strip()
        lines = [text]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1].rstrip()
            lines.append(self._line(_MORE).rstrip())
        return "\n".join(lines).strip()

    def _line(self, prompt: str) -> str:
        if self._edits:
            return input(prompt)
        sys.stderr.write(paint(prompt, "2"))
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def _complete(self, text: str, state: int) -> str | None:
        """What readline asks for: the `state`-th word that begins with `text`."""
        if self._readline is None or self._readline.get_begidx() or not text.startswith("/"):
            return None
        found = [word for word in self._words if word.startswith(text)]
        return f"{found[state]} " if state < len(found) else None


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # Windows: the terminal itself edits lines
        return None
    return readline
