"""`amkv chat`: asks questions about a context, one, many, or in a conversation."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amcli.commands import completion
from amcli.commands import options as opt
from amcli.commands.conversation import Conversation, answer
from amcli.commands.shared import open_contexts, warn_of_length, work
from amcli.console import Console, is_terminal, printable, remark
from amcli.errors import UsageError
from amcli.files import open_artifact
from amcli.pipeline.source import STDIN
from amcli.processes import require_one

if TYPE_CHECKING:
    from amcli.pipeline.session import Session

Contexts = Annotated[
    list[Path] | None,
    typer.Option(
        "--context",
        "-c",
        metavar="FILE",
        autocompletion=completion.artifacts,
        show_default=False,
        help=(
            "The artifact to chat with, compact or prefill. Given several times, one follows the "
            "other."
        ),
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        show_default=False,
        help="Ask one question, print its answer, and exit; - reads it from standard input.",
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens",
        metavar="N",
        parser=opt.whole("--max-tokens", "256", least=1),
        help="Longest answer, in tokens.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        metavar="T",
        parser=opt.number("--temperature", "0.7", least=0),
        help="0 takes the likeliest token every time; higher is more varied.",
    ),
]


def chat(
    context: Contexts = None,
    prompt: Prompt = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0,
    seed: opt.Seed = 0,
    model: opt.Model = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    trust_remote_code: opt.Trust = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Ask questions about a document that was compacted or prefilled.

    On a terminal this is a conversation: /help lists what can be typed, Ctrl-C
    stops an answer, Ctrl-D leaves. With -p it is one question. From a pipe,
    every line is one turn, and the answers go to standard output.

    The model is the artifact's; another one is refused if it does not fit.

    \b
      amkv chat --context doc.amkv
      amkv chat --context doc.amkv -p "Who wrote this?"
      amkv chat --context one.amkv --context two.amkv
    """
    console = Console(json, quiet, debug)
    paths = _given(context)
    for path in paths:
        open_artifact(path).close()  # says what is wrong before anything heavy is loaded
    talking = prompt is None and is_terminal(sys.stdin)
    if talking and json:
        raise UsageError("--json needs a question", 'add -p "…", or pipe questions in')
    if prompt in (None, STDIN):
        require_one("share what is typed", 'ask with -p "…"')
    question = None if prompt is None else _question(prompt)
    began = time.perf_counter()
    with work(console) as progress:
        found = open_contexts(progress, paths, model, device, dtype, trust=trust_remote_code)
        from amcli.pipeline.session import Session

        session = Session(found, max_tokens, temperature, seed)
        from amcli.models import failures
    loading = time.perf_counter() - began
    warn_of_length(console, found)
    with failures.quiet():
        if talking:
            Conversation(console, session, paths).run()
            return
        asker = _Asker(console, session, paths, loading)
        for text in _lines() if question is None else [question]:
            asker.ask(text)


def _given(contexts: list[Path] | None) -> list[Path]:
    """The contexts there have to be, at least one."""
    if not contexts:
        raise UsageError(
            "no context was given", "name an artifact, such as: amkv chat --context doc.amkv"
        )
    return contexts


def _question(prompt: str) -> str:
    """The question of -p; `-` stands for standard input."""
    if prompt == STDIN and is_terminal(sys.stdin):
        remark("type the question; Ctrl-D ends it")
    try:
        text = prompt if prompt != STDIN or sys.stdin is None else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError("the question is not UTF-8 text", "convert it first") from error
    if not text.strip():
        raise UsageError("the question is empty", 'ask one: -p "Who wrote this?"')
    return text.strip()


def _lines() -> Iterator[str]:
    """The questions on standard input: every line that is not empty."""
    asked = False
    try:
        for line in sys.stdin or ():
            if line.strip():
                asked = True
                yield line.strip()
    except UnicodeDecodeError as error:
        raise UsageError("a question is not UTF-8 text", "convert it first") from error
    if not asked:
        raise UsageError("no question was given", 'add -p "…", or pipe questions in')


@dataclass
class _Asker:
    """Answers questions that do not come from a terminal."""

    console: Console
    session: Session
    paths: list[Path]
    loading: float

    def ask(self, question: str) -> None:
        """Prints the answer as it comes, or its record as one line of JSON."""
        began = time.perf_counter()
        pieces = answer(self.session, question)
        if self.console.json:
            text = "".join(pieces)
            self.console.record(self._record(question, text, time.perf_counter() - began))
        else:
            safe = is_terminal(sys.stdout)
            for piece in pieces:
                self.console.data(printable(piece) if safe else piece)
            self.console.data("\n")
        if self.session.tokens >= self.session.max_tokens:
            self.console.note(f"the answer was cut off at --max-tokens {self.session.max_tokens}")

    def _record(self, question: str, text: str, seconds: float) -> dict[str, Any]:
        return {
            "question": question,
            "answer": text,
            "tokens": self.session.tokens,
            "seconds": round(seconds, 3),
            "load_seconds": round(self.loading, 3),
            "context": ", ".join(str(path) for path in self.paths),
            "model": self.session.context.loaded.id,
        }
