"""Conversations, word for word: what is typed, what pocket answers, and what is said besides."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from amcli.commands.comparison import Whole
from amcli.commands.conversation import Conversation
from amcli.commands.screen import console as output
from amcli.commands.screen.console import Console
from amcli.commands.shared import open_contexts
from amcli.generator.dialogues import Question
from amcli.models.decoding import Decoder
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.reading import reread
from amcli.pipeline.talk.session import Session
from amcli.system.progress import Silent
from conftest import Amkv

Talk = Callable[..., str]
FOOT = re.compile(r"  \d+ tokens · [0-9.e+]+ tokens/s · [0-9.]+ MB · [0-9,]+ positions left")


@pytest.fixture(scope="module")
def context(made: Path) -> Context:
    return open_contexts(Silent(), [made / "doc.amkv"], None, None, None)


@pytest.fixture
def talk(
    here: Path,
    made: Path,
    context: Context,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Talk:
    """Types lines into a conversation, and returns its transcript: both streams as they came."""

    def type_in(
        *lines: str, session: Session | None = None, whole: Whole | None = None, quiet: bool = False
    ) -> str:
        session = session or Session(context, max_tokens=24)
        everything = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(output, "switches", output.Switches())
            patch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
            patch.setattr(sys, "stdout", everything)
            patch.setattr(sys, "stderr", everything)
            patch.setattr(Conversation, "show_panel", lambda self: None)
            talking = Conversation(Console(quiet=quiet), session, [made / "doc.amkv"], whole)
            talking.run()
        return FOOT.sub("  (footer)", everything.getvalue())

    return type_in


def test_a_conversation_word_for_word(talk: Talk, question: Question) -> None:
    asked, answer = question.question, question.answer
    transcript = talk(
        asked, "/undo", asked, "/retry", "/temperature 0.5", "/temperature", "/temperature 0",
        "/system Be brief.", "/system", "/system off", "/reset", asked, "/quit",
    )  # fmt: skip
    assert transcript == (
        f"> {answer}\n  (footer)\n"
        f"> (taken back: {asked})\n"
        f"> {answer}\n  (footer)\n"
        f"> {answer}\n  (footer)\n"
        "> (temperature 0.5)\n> (temperature 0.5)\n> (temperature 0)\n"
        "> (instructions: Be brief.)\n> (instructions: Be brief.)\n> (no instructions)\n"
        "> (a new conversation)\n"
        f"> {answer}\n  (footer)\n> "
    )


def test_the_document_said_again_word_for_word(talk: Talk, document_start: str) -> None:
    transcript = talk("Repeat the previous context.", session=None)
    said, _, foot = transcript.removeprefix("> ").partition("\n  ")
    assert " ".join(said.split()).startswith(document_start)
    assert foot == "(footer)\n(cut off at --max-tokens 24)\n> \n"


def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(
    talk: Talk, question: Question
) -> None:
    transcript = talk(
        "/undo", "/retry", "/compact", "/compact x", "/temperature hot", "/save", "/save a.txt",
        "/save a.md", "/save a.amkv", "/reset now", "/rest", "/tempreature 0.7", "/xyz",
        question.question,
    )  # fmt: skip
    errors = [line for line in transcript.splitlines() if "error:" in line or "no command" in line]
    assert [line.partition("> ")[2] for line in errors] == [
        "error: there is no turn to take back: nothing was asked yet",
        "error: there is no turn to take back: nothing was asked yet",
        "error: there is nothing to compact: nothing was said since",
        "error: /compact x is not a number",
        "error: /temperature hot is not a number",
        "error: /save wants one file name",
        "error: there is nothing to save yet",
        "error: there is nothing to save yet",
        "error: nothing was said: the context is what it was",
        "error: /reset takes nothing after it, not 'now'",
        "there is no command /rest; did you mean '/reset'? /help lists them",
        "there is no command /tempreature; did you mean '/temperature'? /help lists them",
        "there is no command /xyz; /help lists them",
    ]
    assert transcript.endswith(f"> {question.answer}\n  (footer)\n> \n")


def test_a_question_may_begin_with_a_slash_and_have_several_lines(
    talk: Talk, context: Context
) -> None:
    session = Session(context, max_tokens=2)
    talk(
        "/etc/passwd is what?", "one \\", "  two", '"""three', "", 'four"""', '"""five"""',
        session=session,
    )  # fmt: skip
    assert [turn.question for turn in session.history] == [
        "/etc/passwd is what?", "one\n  two", "three\n\nfour", "five",
    ]  # fmt: skip


def test_quiet_is_answers_only(talk: Talk, question: Question) -> None:
    assert talk(question.question, quiet=True) == f"> {question.answer}\n> \n"


def test_the_conversation_is_saved_to_read_and_to_go_on_with(
    talk: Talk, question: Question, here: Path
) -> None:
    transcript = talk(
        "/system Be brief.", question.question, "/save chat.md", "/save chat.json",
        "/save chat.md", "/save -f 'chat.md'", "/save no/where.md",
    )  # fmt: skip
    assert "error: chat.md already exists\nhint: /save -f FILE replaces it\n" in transcript
    assert "error: the folder no does not exist\n" in transcript
    lines = (here / "chat.md").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# About doc.txt", ""]
    assert re.fullmatch(r"pocket, .*doc\.amkv", lines[2])
    assert lines[3:] == ["", "*Be brief.*", "", f"> {question.question}", "", question.answer]
    record = json.loads((here / "chat.json").read_text(encoding="utf-8"))
    assert record["turns"][0]["question"] == question.question
    assert record["turns"][0]["answer"] == question.answer
    assert record["turns"][0]["system"] == "Be brief."
    assert record["turns"][0]["ended"] == "stop"


def test_a_chat_is_compacted_saved_and_taken_up_again(
    talk: Talk, amkv: Amkv, question: Question, here: Path
) -> None:
    told = "Zoltan Gishurt sits in room 444 and works as a baker."
    transcript = talk(
        told, "/compact 4", "/tokens", question.question, "/save grown.amkv", "/save grown.amkv"
    )
    assert re.search(
        r"> \(\d+ tokens of the conversation: [^→]+ → [^,]+, in [0-9.]+ s\)\n", transcript
    )
    assert re.search(r"conversation  0 tokens, 0 B, not compacted\n", transcript)
    assert "(saved grown.amkv)\n" in transcript
    assert transcript.count("tokens of the conversation:") == 2  # saving compacts the rest
    assert "error: grown.amkv already exists\nhint: /save -f FILE replaces it\n" in transcript
    asked = ("-p", question.question, "-p", "In which room is the desk of Zoltan Gishurt?")
    done = amkv("chat", "-c", "grown.amkv", *asked)
    assert done.out == f"{question.answer}\n444\n"
    assert "and what was said about it: 2 questions" in amkv("inspect", "grown.amkv").out


def test_ctrl_c_stops_the_answer_and_the_cache_stays_whole(
    talk: Talk, context: Context, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(context, max_tokens=24)
    real, calls = Decoder.feed, 0

    def interrupted(*arguments: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        found = real(*arguments, **more)  # type: ignore[arg-type]
        if calls == 3:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Decoder, "feed", interrupted)
    transcript = talk("Repeat the previous context.", question.question, session=session)
    stopped, _, rest = transcript.partition("(stopped)\n")
    assert "(footer)" in stopped
    assert rest == f"> {question.answer}\n  (footer)\n> \n"
    assert session.history[0].ended == "broken-off"
    assert session.cache.get_seq_length() == session.length


def test_an_unexpected_error_does_not_end_the_conversation(
    talk: Talk, context: Context, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.ask

    def ask(self: Session, text: str) -> object:
        if text == "break":
            raise RuntimeError("boom")
        return real(self, text)

    monkeypatch.setattr(Session, "ask", ask)
    transcript = talk("break", question.question)
    assert transcript.startswith("> error: unexpected RuntimeError: boom\n")
    assert transcript.endswith(f"> {question.answer}\n  (footer)\n> \n")


def test_the_end_of_the_models_positions_is_said_before_it_is_reached(
    talk: Talk, context: Context, question: Question
) -> None:
    room = len(Session(context).prompt_ids(question.question)) + 20
    geometry = replace(context.loaded.geometry, max_positions=context.T + room)
    near = replace(context, loaded=replace(context.loaded, geometry=geometry))
    transcript = talk(question.question, question.question, session=Session(near))
    warned = re.search(r"(\d+) of the model's ([0-9,]+) positions are left: /save", transcript)
    assert warned is not None
    assert int(warned[1]) < 20
    assert "positions: " in transcript
    assert re.search(r"error: the model has [0-9,]+ positions: [0-9,]+ are taken", transcript)


def test_compare_follows_what_is_taken_back(
    talk: Talk, context: Context, question: Question
) -> None:
    session = Session(context, max_tokens=24)
    whole = Whole(Session(reread(context, progress=Silent())), 0.0)
    transcript = talk(question.question, "/undo", question.question, session=session, whole=whole)
    block = rf"> compact: .+\n{question.answer}\nwhole document: .+\n{question.answer}\n"
    assert len(re.findall(block, transcript)) == 2
    assert whole.session.turns == session.turns == 1
    assert whole.session.ids == session.ids
