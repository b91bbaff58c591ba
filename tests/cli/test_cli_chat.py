"""chat: one question, questions from a pipe, and a conversation on a real terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect  # type: ignore[import-untyped]
import pytest
from screens import shown

from amcli.commands.conversation import answer
from amcli.commands.shared import open_contexts
from amcli.generator.dialogues import Question
from amcli.generator.documents import Document
from amcli.models import generate
from amcli.pipeline.talk.session import Session
from amcli.system.progress import Silent
from conftest import Amkv

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LONG = "Repeat the previous context."


def test_one_question_prints_its_answer_and_nothing_else(
    amkv: Amkv, compact: Path, question: Question
) -> None:
    done = amkv("chat", "--context", compact, "-p", question.question)
    assert (done.code, done.out, done.err) == (0, question.answer + "\n", "")


def test_a_prefill_answers_as_well(amkv: Amkv, full: Path, question: Question) -> None:
    assert amkv("chat", "-c", full, "-p", question.question).out == question.answer + "\n"


def test_the_question_can_come_from_standard_input(
    amkv: Amkv, compact: Path, question: Question
) -> None:
    asked = f"\n{question.question}\n".encode()
    assert amkv("chat", "-c", compact, "-p", "-", stdin=asked).out == question.answer + "\n"


def test_json_of_one_question(amkv: Amkv, compact: Path, question: Question) -> None:
    done = amkv("chat", "-c", compact, "-p", question.question, "--json")
    record = json.loads(done.out)
    assert record["question"] == question.question
    assert record["answer"] == question.answer
    assert record["model"] == "pocket"
    assert 0 < record["tokens"] <= len(question.answer)


def test_every_line_of_a_pipe_is_a_turn(amkv: Amkv, compact: Path, question: Question) -> None:
    lines = f"{question.question}\n\n  \n{question.question}\n".encode()
    assert amkv("chat", "-c", compact, stdin=lines).out == f"{question.answer}\n" * 2
    done = amkv("chat", "-c", compact, "--json", stdin=lines)
    assert [json.loads(line)["answer"] for line in done.out.splitlines()] == [question.answer] * 2


def test_commands_work_from_a_pipe_as_on_a_terminal(
    amkv: Amkv, compact: Path, question: Question, here: Path
) -> None:
    lines = f"{question.question}\n/save chat.md\n/tokens\n/quit\nnever asked\n".encode()
    done = amkv("chat", "-c", compact, stdin=lines)
    assert (done.code, done.out) == (0, f"{question.answer}\n")
    saved, *tokens = done.err.splitlines()
    assert saved == "(saved chat.md)"
    assert [line.split()[0] for line in tokens] == ["context", "conversation", "positions"]
    assert question.answer in (here / "chat.md").read_text(encoding="utf-8")
    again = amkv("chat", "-c", compact, stdin=lines)  # a script must not go on as if it had saved
    assert again.code == 2
    assert again.errors == ["error: chat.md already exists", "hint: /save -f FILE replaces it"]
    asked = ("-p", question.question, "-p", "/save -f chat.json")
    assert amkv("chat", "-c", compact, *asked, "-q").out == f"{question.answer}\n"
    assert json.loads((here / "chat.json").read_text(encoding="utf-8"))["turns"]


def test_a_misspelt_command_is_not_put_to_the_model(amkv: Amkv, compact: Path) -> None:
    for done in (
        amkv("chat", "-c", compact, stdin=b"/sav chat.md\n"),
        amkv("chat", "-c", compact, "-p", "/sav chat.md"),
    ):
        assert (done.code, done.out) == (2, "")
        assert done.errors == [
            "error: there is no command /sav",
            "hint: did you mean '/save'? /help lists them",
        ]
    done = amkv("chat", "-c", compact, "-p", "/etc/hosts says what?", "--max-tokens", "2")
    assert done.code == 0


def test_a_long_answer_is_cut_and_said_to_be(amkv: Amkv, compact: Path) -> None:
    done = amkv("chat", "-c", compact, "-p", LONG, "--max-tokens", "5", "--json")
    assert json.loads(done.out)["tokens"] == 5
    assert done.err == "the answer was cut off at --max-tokens 5\n"


def test_temperature_and_seed_make_the_answer(amkv: Amkv, compact: Path) -> None:
    def said(*words: str) -> str:
        asked = ("chat", "-c", str(compact), "-p", LONG, "--max-tokens", "12")
        return amkv(*asked, "--temperature", "3", *words).out

    assert said("--seed", "1") == said("--seed", "1")
    assert said("--seed", "1") != said("--seed", "2")


def test_several_questions_are_turns_of_one_conversation(
    amkv: Amkv, compact: Path, question: Question
) -> None:
    asked = ("-p", "The password is plum-juice.", "-p", question.question)
    done = amkv("chat", "-c", compact, *asked, "--json", "--max-tokens", "24")
    first, second = map(json.loads, done.out.splitlines())
    assert second["answer"] == question.answer
    assert second["memory_bytes"] > first["memory_bytes"]
    twice = amkv("chat", "-c", compact, "-p", "-", "-p", "-", stdin=b"x")
    assert (twice.code, twice.errors[0]) == (2, "error: -p - was given twice")


def test_a_file_of_questions_gives_a_line_of_json_each(
    amkv: Amkv, compact: Path, question: Question, here: Path
) -> None:
    rows = [{"id": 7, "question": question.question, "answer": "x"}, question.question]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (here / "q.jsonl").write_text(text, encoding="utf-8")
    done = amkv("chat", "-c", compact, "--questions", "q.jsonl")
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [record["answer"] for record in found] == [question.answer] * 2
    assert found[0]["given"] == rows[0]
    assert found[0]["memory_bytes"] == found[1]["memory_bytes"]  # each asked by itself
    piped = amkv("chat", "-c", compact, "--questions", "-", stdin=text.encode())
    assert [json.loads(x)["answer"] for x in piped.out.splitlines()] == [question.answer] * 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b'{"question": "Who?"}\n{"question": 3}\n', "line 2 of q.jsonl has no question"),
        (b'\n{"question": "Who?"\n', 'line 2 of q.jsonl is not JSON: {"question": "Who?"'),
        (b"[1, 2]", "line 1 of q.jsonl has no question"),
        (b"[" * 100_000, "line 1 of q.jsonl is not JSON: " + "[" * 39 + "…"),
        (b" \n", "q.jsonl has no questions"),
        (b"\xff", "q.jsonl is not UTF-8 text"),
    ],
)
def test_a_file_of_questions_is_checked_before_anything_is_loaded(
    amkv: Amkv, compact: Path, here: Path, text: bytes, error: str
) -> None:
    (here / "q.jsonl").write_bytes(text)
    done = amkv("chat", "-c", compact, "--questions", "q.jsonl")
    assert (done.code, done.out, done.errors[0]) == (2, "", f"error: {error}")


def test_a_file_of_questions_that_is_not_there_or_not_alone(amkv: Amkv, compact: Path) -> None:
    done = amkv("chat", "-c", compact, "--questions", "no.jsonl")
    assert (done.code, done.errors[0]) == (2, "error: no such file: no.jsonl")
    done = amkv("chat", "-c", compact, "--questions", "no.jsonl", "-p", "Who?")
    assert (done.code, done.errors[0]) == (2, "error: --questions and -p exclude each other")


def test_the_same_question_of_the_whole_document(
    amkv: Amkv, compact: Path, question: Question
) -> None:
    asked = ("chat", "-c", compact, "-p", question.question, "--compare")
    record = json.loads(amkv(*asked, "--json").out)
    assert record["answer"] == record["whole"]["answer"] == question.answer
    assert set(record["whole"]) == {"answer", "tokens", "seconds", "memory_bytes", "read_seconds"}
    done = amkv(*asked)
    shown = rf"compact: .+\n{question.answer}\nwhole document: .+\n{question.answer}\n"
    assert re.fullmatch(shown, done.out)


def test_questions_that_are_not_utf8(amkv: Amkv, compact: Path) -> None:
    for words in ((), ("-p", "-")):
        done = amkv("chat", "-c", compact, *words, stdin=b"\xff?\n")
        assert done.code == 2
        assert "not UTF-8" in done.errors[0]


def test_white_space_around_an_answer_is_dropped_as_it_streams() -> None:
    class Said(Session):
        def __init__(self) -> None:
            """No context."""

        def ask(self, question: str) -> Iterator[str]:
            yield from (" ", "\n A", " ", " b", ".", "\n", " ")

    assert list(answer(Said(), "?")) == ["A", "  b", "."]


def test_a_question_broken_off_before_its_answer_leaves_no_trace(
    compact: Path, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = open_contexts(Silent(), [compact], None, None, None)
    session = Session(context)

    def interrupted(*arguments: object, **more: object) -> None:
        real(*arguments, **more)  # the cache has seen the question when the signal comes
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        real: Callable[..., object] = generate.feed
        patch.setattr(generate, "feed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.ask("Who lives here, and why?"))
    assert session.turns == 0
    assert session.cache.get_seq_length() == context.T
    assert "".join(session.ask(question.question)) == question.answer
    assert session.turns == 1


Spawn = Callable[..., pexpect.spawn]


@pytest.fixture
def spawn(here: Path, compact: Path, environment: dict[str, str]) -> Iterator[Spawn]:
    """Starts a conversation on a terminal of its own."""
    children: list[pexpect.spawn] = []

    def start(*words: str, columns: int = 80, **more: str) -> pexpect.spawn:
        child = pexpect.spawn(
            sys.executable,
            ["-m", "amcli", "chat", "--context", str(compact), *words],
            cwd=str(here),
            env={**environment, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **more},
            dimensions=(24, columns),
            encoding="utf-8",
            timeout=60,
        )
        children.append(child)
        child.expect(r"> ")
        return child

    yield start
    for child in children:
        child.close(force=True)


@pytest.fixture
def terminal(spawn: Spawn) -> pexpect.spawn:
    return spawn()


def lines(child: pexpect.spawn) -> list[str]:
    """What is on the screen before the match, without colours."""
    return [line.rstrip("\r") for line in ESCAPES.sub("", child.before).split("\n")]


def readable_on_light_and_dark(raw: str) -> None:
    """No colour that a light or a dark background swallows: nothing is written in black or
    white or what is close to them, nor on them."""
    for codes in re.findall(r"\x1b\[([0-9;]*)m", raw):
        plain = re.sub(r"[34]8;(5;\d+|2;\d+;\d+;\d+)", "", codes)
        assert not {"30", "37", "90", "97", "40", "47", "100", "107"} & set(plain.split(";")), codes
        numbers = [int(n) for n in re.findall(r"38;5;(\d+)", codes)]
        assert not {0, 7, 15, 16, 231, *range(232, 236), *range(252, 256)} & set(numbers), codes


def test_a_conversation_on_a_terminal(terminal: pexpect.spawn, question: Question) -> None:
    panel = lines(terminal)
    readable_on_light_and_dark(terminal.before)
    shown = "\n".join(panel)
    for word in ("doc.txt", "doc.amkv", "tokens", "1.0× smaller", "pocket on", "Ctrl-D"):
        assert word in shown
    # A bar that redraws itself counts as one line: what is left of it comes after its last return.
    assert max(len(line.split("\r")[-1]) for line in panel) <= 80

    for _ in range(2):  # the second turn sees the first one, and knows the document still
        terminal.sendline(question.question)
        terminal.expect_exact(question.answer)
        terminal.expect(r"> ")
        readable_on_light_and_dark(terminal.before)
    terminal.sendline("/help")
    terminal.expect_exact("/reset")
    terminal.expect(r"> ")
    terminal.sendline("/reset")
    terminal.expect_exact("a new conversation")
    terminal.expect(r"> ")
    terminal.sendline("/rest")
    terminal.expect_exact("there is no command /rest; did you mean '/reset'? /help lists them")
    terminal.expect(r"> ")
    terminal.sendline("/quit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_ctrl_c_stops_the_answer_not_the_conversation(
    terminal: pexpect.spawn, question: Question, document_start: str
) -> None:
    terminal.sendline(LONG)
    terminal.expect_exact(document_start.removeprefix("# "))  # which is a heading
    terminal.sendintr()
    terminal.expect_exact("(stopped)")
    terminal.expect(r"> ")
    terminal.sendline(question.question)
    terminal.expect_exact(question.answer)
    terminal.expect(r"> ")
    terminal.sendintr()
    terminal.expect_exact("Ctrl-C again or Ctrl-D to leave")
    terminal.expect(r"> ")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("colours", [True, False])
def test_nothing_is_wider_than_the_terminal(
    spawn: Spawn, question: Question, columns: int, colours: bool
) -> None:
    child = spawn("--compare", columns=columns, **({} if colours else {"NO_COLOR": "1"}))
    screens = [child.before]
    for text in (question.question, "/help", "/tokens", "/undo"):
        child.sendline(text)
        child.expect(r"\n(?:\x1b\[\?2004h)?> ")
        screens.append(child.before)
    child.sendeof()
    child.expect(pexpect.EOF)
    shown = ESCAPES.sub("", "".join(screens)).replace("\x1b", "")
    assert "whole document" in shown
    widths = [len(line.split("\r")[-1]) for line in shown.replace("\r\n", "\n").split("\n")]
    assert max(widths) <= columns
    coloured = re.findall(r"\x1b\[[0-9;]*3[0-9](?:;[0-9;]*)?m", "".join(screens))
    assert colours or not coloured


@pytest.mark.slow
def test_a_long_answer_leaves_the_scrollback_whole(
    terminal: pexpect.spawn, question: Question, document: Document
) -> None:
    """Every line of the answer is printed once, in order; only the region that grows is redrawn."""
    terminal.sendline(LONG)
    terminal.expect("positions left", timeout=120)
    final = shown(terminal.before)
    said = " ".join(final.partition("\n")[2].split())
    words = " ".join(re.sub(r"[#*|-]", " ", document.text).split()[:60])
    assert words in re.sub(r"\s+", " ", re.sub(r"[•─#*|-]", " ", said))


def test_ctrl_d_leaves_and_the_history_is_kept_for_its_owner(
    terminal: pexpect.spawn, environment: dict[str, str]
) -> None:
    terminal.sendline("/tok\t")  # Tab completes
    terminal.expect_exact("not compacted")
    terminal.expect(r"> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    path = Path(environment["XDG_STATE_HOME"]) / "amkv" / "chat-history"
    assert path.read_text(encoding="utf-8").split() == ["/tokens"]
    assert path.stat().st_mode & 0o077 == 0


def test_json_is_not_for_conversations(
    here: Path, compact: Path, environment: dict[str, str]
) -> None:
    words = ["-m", "amcli", "chat", "--context", str(compact), "--json"]
    out, code = pexpect.run(
        f"{sys.executable} {' '.join(words)}",
        cwd=str(here),
        env={**environment, "NO_COLOR": "1"},
        withexitstatus=True,
        encoding="utf-8",
    )
    assert code == 2
    assert "error: --json needs a question" in out
