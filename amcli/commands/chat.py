"""`amkv chat`: asks one or many questions about a context, or holds a conversation."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amcli.commands import completion
from amcli.commands import options as opt
from amcli.commands.comparison import Whole
from amcli.commands.conversation import Conversation, after_thoughts, answer, show
from amcli.commands.questions import lines, prompts
from amcli.commands.screen.console import Console
from amcli.commands.screen.terminal import is_terminal
from amcli.commands.shared import open_contexts, warn_of_length, work
from amcli.commands.slash import Slash, is_command, misspelt
from amcli.errors import UsageError
from amcli.pipeline.contexts.source import STDIN
from amcli.pipeline.talk.questions import Asked, from_file
from amcli.system.files import open_artifact, read_ahead
from amcli.system.processes import require_one

if TYPE_CHECKING:
    from amcli.pipeline.talk.session import Session, Turn
    from amcli.system.progress import Progress

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
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        show_default=False,
        help=(
            "Ask one question, print its answer, and exit; - reads it from standard input. Given "
            "several times, they are turns of one conversation."
        ),
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help=(
            "Answer from the whole document too, which is read again, and show both with time "
            "and memory."
        ),
    ),
]
MaxTokens = Annotated[
    int, opt.count("--max-tokens", "256", "Longest answer, in tokens.", show_default=True)
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
Think = Annotated[
    bool,
    typer.Option(
        "--think/--no-think",
        help="Let a model think before it answers, where its template has a switch for that; "
        "thoughts are shown dimmed on standard error, and are no part of the answer.",
    ),
]


def chat(
    context: Contexts = None,
    prompt: Prompts = None,
    questions: opt.Questions = None,
    system: opt.SystemAfter = None,
    compare: Compare = False,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0,
    think: Think = False,
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
    every line is one turn, and the answers go to standard output; commands
    such as /save chat.md work there too.

    The model is the artifact's; another one is refused if it does not fit.

    \b
      amkv chat --context doc.amkv
      amkv chat --context doc.amkv -p "Who wrote this?"
      amkv chat --context doc.amkv -p "Who wrote this?" --compare
      amkv chat --context doc.amkv --questions questions.jsonl > answers.jsonl
      amkv chat --context one.amkv --context two.amkv
    """
    console = Console(json, quiet, debug)
    paths = _given(context)
    for path in paths:
        open_artifact(path).close()  # says what is wrong before anything heavy is loaded
        read_ahead(path)
    if (not prompt and questions is None) or STDIN in [*(prompt or ()), str(questions)]:
        require_one("share what is typed", 'ask with -p "…"')
    asked = _asked(prompt, questions)
    talking = asked is None and is_terminal(sys.stdin)
    if talking and json:
        raise UsageError("--json needs a question", 'add -p "…", or pipe questions in')
    began = time.perf_counter()
    with work(console) as progress:
        found = open_contexts(progress, paths, model, device, dtype, trust=trust_remote_code)
        from amcli.models import failures
        from amcli.pipeline.talk.session import Session

        session = Session(found, max_tokens, temperature, seed, system, think)
        loading = time.perf_counter() - began
        whole = _whole(session, progress) if compare else None
    warn_of_length(console, found)
    if think:
        if not found.loaded.chat.can_choose_to_think:
            console.note(f"{found.loaded.id} has no switch for thinking: --think changes nothing")
        session.thought = console.aside
    with failures.quiet():
        if talking:
            Conversation(console, session, paths, whole).run()
            return
        asker = _Asker(console, session, paths, loading, whole)
        if questions is not None:
            console.json = True
            asker.ask_each(asked or [])
            return
        asker.talk(lines() if asked is None else asked)


def _given(contexts: list[Path] | None) -> list[Path]:
    """The contexts, of which there must be at least one."""
    if not contexts:
        raise UsageError(
            "no context was given", "name an artifact, such as: amkv chat --context doc.amkv"
        )
    return contexts


def _asked(given: list[str] | None, file: Path | None) -> list[Asked] | None:
    """The questions on the command line, or in the file it names; None: neither was given."""
    if file is not None and given:
        raise UsageError("--questions and -p exclude each other", "give one of them")
    if file is not None:
        return from_file(file)
    if not given:
        return None
    asked = prompts(given)
    if any(_is_command(question.text) for question in asked):
        require_one("run commands", "leave out what begins with /")
    return asked


def _is_command(text: str) -> bool:
    """Whether a turn is a command, as in a conversation. UsageError for one that is misspelt."""
    if (wrong := misspelt(text)) is not None:
        raise wrong
    return is_command(text)


def _whole(session: Session, progress: Progress) -> Whole:
    """The whole-document side of --compare."""
    from amcli.pipeline.contexts.reading import reread
    from amcli.pipeline.talk.session import Session as Another

    began = time.perf_counter()
    context = reread(session.context, progress=progress)
    return Whole(Another(context), time.perf_counter() - began)


@dataclass
class _Asker:
    """Answers questions that do not come from a terminal."""

    console: Console
    session: Session
    paths: list[Path]
    loading: float
    whole: Whole | None

    def talk(self, turns: Iterable[Asked]) -> None:
        """One turn after another: questions, and the commands of a conversation."""
        panel = Conversation(self.console, self.session, self.paths, self.whole).show_panel
        slash = Slash(
            self.console, self.session, self.paths, lambda text: self.ask(Asked(text)), panel
        )
        for turn in turns:
            if not _is_command(turn.text):
                self.ask(turn)
            elif not slash.run(turn.text):
                return

    def ask_each(self, questions: list[Asked]) -> None:
        """Every question by itself, right after the context."""
        with self.console.progress() as progress:
            progress.start("answer", len(questions))
            for question in questions:
                self.session.reset()
                self.ask(question)
                progress.advance()

    def ask(self, question: Asked) -> None:
        """Prints the answer as it comes, or its record as one line of JSON."""
        large: Turn | None = None
        if self.whole is not None:
            small, large = self.whole.answer(self.session, question.text)
            if not self.console.json:
                self.whole.show(self.console, self.session, small, large)
        elif self.console.json:
            for _ in self.session.ask(question.text):
                pass
        else:
            show(self.console, after_thoughts(answer(self.session, question.text), self.session))
        turn = self.session.history[-1]
        if self.console.json:
            self.console.record(self._record(question, turn, large))
        if turn.ended == "max-tokens":
            self.console.note(f"the answer was cut off at --max-tokens {self.session.max_tokens}")
        elif turn.ended == "positions":
            self.console.note(
                f"the answer was cut off: all {self.session.positions:,} positions are taken"
            )

    def _record(self, question: Asked, turn: Turn, large: Turn | None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "question": question.text,
            "answer": turn.answer,
            "tokens": turn.tokens,
            "seconds": round(turn.seconds, 3),
            "ended": turn.ended,
            "memory_bytes": self.session.cache.nbytes(),
            "load_seconds": round(self.loading, 3),
            "context": ", ".join(str(path) for path in self.paths),
            "model": self.session.context.loaded.id,
        }
        if turn.thoughts:
            found["thoughts"] = turn.thoughts
        if question.given is not None:
            found["given"] = question.given
        if self.whole is not None and large is not None:
            found["whole"] = self.whole.record(large)
        return found
