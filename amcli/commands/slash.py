"""The commands in a conversation: /help and the others."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amcli.commands import options as opt
from amcli.commands import transcript
from amcli.commands.screen.console import Console, remark
from amcli.commands.screen.terminal import printable
from amcli.errors import UsageError, did_you_mean
from amcli.system.files import EXTENSION, require_writable
from amcli.system.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from amcli.pipeline.talk.session import Session

_HELP = {
    "/help": ("", "this list"),
    "/context": ("", "what is loaded"),
    "/tokens": ("", "what the conversation takes: tokens, positions, memory"),
    "/undo": ("", "take the last question and its answer back"),
    "/retry": ("", "ask the last question again"),
    "/reset": ("", "start a new conversation about the same document"),
    "/compact": ("[R]", "compact the conversation into the context, R times smaller"),
    "/save": ("FILE", ".md or .json: the conversation; .amkv: the context with it"),
    "/system": ("[TEXT]", "instructions that go before the next question; off: none"),
    "/temperature": ("[T]", "0 takes the likeliest token; higher is more varied"),
    "/quit": ("", "leave (so does Ctrl-D)"),
}
_KEYS = """\
  \\ at the end of a line, or \"\"\" around several: the question has more lines
  Ctrl-C   stop an answer; at the prompt, twice to leave"""


def known() -> list[str]:
    """All commands."""
    return [*_HELP, "/exit"]


def is_command(text: str) -> bool:
    """Whether a line is a command."""
    return text.split(maxsplit=1)[0] in known()


def misspelt(text: str) -> UsageError | None:
    """What to say to a line that looks like a command and is none."""
    word = text.split(maxsplit=1)[0]
    if is_command(text) or not word.startswith("/"):
        return None
    meant = did_you_mean(word, known())
    if not meant and word != text:  # a question that begins with a path
        return None
    return UsageError(f"there is no command {printable(word)}", f"{meant}/help lists them")


@dataclass
class Slash:
    """Runs the commands of one conversation.

    ask    asks a question and shows the answer
    panel  shows what is loaded
    """

    console: Console
    session: Session
    paths: Sequence[Path]
    ask: Callable[[str], None]
    panel: Callable[[], None]

    def run(self, text: str) -> bool:
        """Runs one command line; False if the user wants to leave. Raises UsageError."""
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        run: Callable[[str], None] = getattr(self, f"_{word.removeprefix('/')}")
        if rest and not _HELP[word][0]:
            raise UsageError(f"{word} takes nothing after it, not {rest!r}", f"type {word}")
        run(rest)
        return True

    def _help(self, _: str) -> None:
        for word, (value, meaning) in _HELP.items():
            remark(f"  {f'{word} {value}':<17} {meaning}")
        remark(_KEYS)

    def _context(self, _: str) -> None:
        self.panel()

    def _tokens(self, _: str) -> None:
        session = self.session
        context, said = session.context, len(session.ids)
        remark(f"  context       {context.T:,} tokens, {bytes_text(context.cache.nbytes())}")
        more = session.cache.nbytes() - context.cache.nbytes()
        remark(f"  conversation  {said:,} tokens, {bytes_text(more)}, not compacted")
        limit = session.positions
        if limit is not None:
            remark(f"  positions     {session.length:,} of {limit:,}")

    def _undo(self, _: str) -> None:
        turn = self.session.undo()
        self.console.note(f"(taken back: {_short(turn.question)})")

    def _retry(self, _: str) -> None:
        self.ask(self.session.undo().question)

    def _reset(self, _: str) -> None:
        self.session.reset()
        self.console.note("(a new conversation)")

    def _system(self, text: str) -> None:
        if text:
            self.session.system = None if text == "off" else text
        told = self.session.system
        self.console.note("(no instructions)" if told is None else f"(instructions: {told})")

    def _temperature(self, text: str) -> None:
        if text:
            self.session.temperature = opt.number("/temperature", "0.7", least=0)(text)
        self.console.note(f"(temperature {self.session.temperature:g})")

    def _compact(self, text: str) -> None:
        from amcli.pipeline.talk import growing

        ratio = growing.RATIO
        if text:
            ratio = opt.number("/compact", "20", least=1)(text)
        self._grow(ratio)

    def _grow(self, ratio: float) -> None:
        from amcli.pipeline.talk import growing

        began = time.perf_counter()
        with self.console.progress() as progress:
            found = growing.grow(self.session, ratio, progress=progress)
        self.console.note(
            f"({found.tokens:,} tokens of the conversation: {bytes_text(found.full)} → "
            f"{bytes_text(found.stored)}, in {seconds_text(time.perf_counter() - began)})"
        )

    def _save(self, text: str) -> None:
        target, force = _target(text)
        if target.suffix.lower() == EXTENSION:
            self._save_context(target, force)
        else:
            if not self.session.history:
                raise UsageError("there is nothing to save yet", "ask a question")
            with _overwriting():
                transcript.write(self.session, self.paths, target, force)
        self.console.note(f"(saved {target})")

    def _save_context(self, target: Path, force: bool) -> None:
        from amcli.pipeline.talk import growing

        if not self.session.history:
            raise UsageError(
                "nothing was said: the context is what it was", "ask a question, then save"
            )
        if any(target.exists() and target.samefile(path) for path in self.paths):
            raise UsageError(f"{target} is the context of this conversation", "name another file")
        with _overwriting():
            require_writable(target, force)
            if self.session.ids:
                self._grow(growing.RATIO)
            growing.save(self.session, target, force)


def _target(text: str) -> tuple[Path, bool]:
    """The file to write, and whether it may replace an existing one."""
    try:
        words = shlex.split(text)
    except ValueError:  # an unmatched quotation mark
        words = text.split()
    force = words[:1] == ["-f"]
    names = words[1:] if force else words
    if len(names) != 1:
        raise UsageError("/save wants one file name", "/save chat.md, or /save -f chat.md")
    return Path(names[0]).expanduser(), force


@contextmanager
def _overwriting() -> Iterator[None]:
    """Says what to type here if a file exists; the usual hints are for the command line."""
    try:
        yield
    except UsageError as error:
        if error.code != "file-exists":
            raise
        raise UsageError(error.message, "/save -f FILE replaces it", field="path") from error


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"
