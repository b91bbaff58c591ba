"""Suite `qa`: a user's own documents and questions, and the whole document's own answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boxes
import pytest

from amcli.commands.app import main
from amcli.errors import UsageError
from amcli.evaluation import makers, runner, scorers
from amcli.evaluation.results import Results
from amcli.evaluation.settings import Settings
from amcli.evaluation.suites import base
from amcli.evaluation.suites.base import Document, Measure, Question, Wanted
from amcli.generator.documents import generate
from amcli.models.replies import answers
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.system.progress import Silent

NOBODY = "What is the pet of nobody at all?"
ROW = {"text": "Some text.", "questions": ["Who?"]}


def made(path: Path | None, **more: Any) -> list[Document]:
    measure = Measure(lambda texts: [len(text.split()) for text in texts])
    options = {"docs": 0, "questions": None, "tokens": 0, "seed": 0, "measure": measure, **more}
    return base.get("qa").documents(Wanted(path=path, **options))


def lines(path: Path, *rows: Any) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


# ---- the file ----------------------------------------------------------------------------------


def test_documents_are_texts_or_files_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "page.html").write_text("<html><p>Hello, <b>page</b>.</p></html>")
    (tmp_path / "plain.txt").write_text("Plain text.", encoding="utf-8")
    questions = [{"question": " Who? ", "answer": " Vera.\n", "kind": "person"}, "Why?"]
    file = lines(
        tmp_path / "qa.jsonl",
        {"name": "first", "text": "Some text.", "questions": questions},
        "",
        {"text": "More text.", "questions": [{"question": "What?", "note": 3}]},
        {"path": "sub/page.html", "questions": ["What?"]},
        {"name": "third", "path": "plain.txt", "questions": ["What?"]},
    )
    found = made(file)
    assert [(d.name, d.text.strip()) for d in found] == [
        ("first", "Some text."),
        ("line 3", "More text."),
        ("page.html", "Hello, page."),
        ("third", "Plain text."),
    ]
    assert found[0].questions == (
        Question("Who?", "Vera.", "person"),
        Question("Why?", "", "question"),
    )
    assert found[1].questions == (Question("What?", "", "question"),)
    cut = made(file, docs=2, questions=1)
    assert [(d.name, [q.text for q in d.questions]) for d in cut] == [
        ("first", ["Who?"]),
        ("line 3", ["What?"]),
    ]


def test_one_document_has_a_file_of_questions_of_its_own(tmp_path: Path) -> None:
    document = tmp_path / "doc.txt"
    document.write_text("Some text.", encoding="utf-8")
    asked = lines(
        tmp_path / "q.jsonl", '"Who?"', {"question": "What?", "answer": "A fox", "kind": "pet"}
    )
    [found] = made(document, asked=asked)
    assert (found.name, found.text) == ("doc.txt", "Some text.")
    assert found.questions == (Question("Who?", "", "question"), Question("What?", "A fox", "pet"))
    assert len(made(document, asked=asked, questions=1)[0].questions) == 1


GOOD = json.dumps(ROW)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2 of FILE is not JSON: {"),
        ("[" * 100_000, "line 2 of FILE is not JSON: [[["),
        ('["Who?"]', "line 2 of FILE is no object"),
        ({"questions": ["Who?"]}, "line 2 of FILE has neither text nor path"),
        ({**ROW, "path": "doc.txt"}, "line 2 of FILE has both text and path"),
        ({**ROW, "text": " \n"}, "line 2 of FILE: the text is empty"),
        ({**ROW, "text": 5}, "line 2 of FILE: text is no string: 5"),
        ({**ROW, "name": ["x"]}, "line 2 of FILE: name is no string: ['x']"),
        ({"text": "Text."}, "line 2 of FILE has no questions"),
        ({**ROW, "questions": []}, "line 2 of FILE has no questions"),
        ({**ROW, "questions": "Who?"}, "line 2 of FILE has no questions"),
        ({**ROW, "questions": ["Who?", {}]}, "line 2 of FILE: question 2 has no question"),
        ({**ROW, "questions": [" "]}, "line 2 of FILE: question 1 has no question"),
        (
            {**ROW, "questions": [{"question": "When?", "answer": 1969}]},
            "line 2 of FILE: question 1: its answer is no string: 1969",
        ),
        (
            {**ROW, "questions": ["Who?", {"question": "When?", "kind": True}]},
            "line 2 of FILE: question 2: its kind is no string: True",
        ),
        ({"path": "gone.txt", "questions": ["Who?"]}, "line 2 of FILE: no such file: FOLDER/gone"),
        # Not standard input, which is for a command line to name.
        ({"path": "-", "questions": ["Who?"]}, "line 2 of FILE: no such file: FOLDER/-"),
        ({"path": "zeros.txt", "questions": ["Who?"]}, "line 2 of FILE: zeros.txt is binary data"),
    ],
    ids=lambda x: x[:60] if isinstance(x, str) else "",
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, said: str) -> None:
    (tmp_path / "zeros.txt").write_bytes(b"\0" * 9)
    file = lines(tmp_path / "qa.jsonl", GOOD, row)
    with pytest.raises(UsageError) as caught:
        made(file)
    expected = said.replace("FILE", str(file)).replace("FOLDER", str(tmp_path))
    assert caught.value.message.startswith(expected)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 250 + 2 * len(str(tmp_path))
    assert caught.value.hint


def test_a_path_is_never_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_text("A file with a short name.", encoding="utf-8")
    file = lines(Path("qa.jsonl"), {"path": "-", "questions": ["Who?"]})
    assert made(file)[0].text == "A file with a short name."


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "empty.jsonl has no documents"),
        ("blank.jsonl", b"\n  \n", "blank.jsonl has no documents"),
        ("doc.amkv", b"{}", "doc.amkv is an artifact, not documents"),
        ("renamed", b"\2\0\0\0\0\0\0\0{}", "renamed is an artifact, not documents"),
        ("latin.jsonl", b"\xe9", "latin.jsonl is not UTF-8 text"),
        ("gone.jsonl", None, "no such file: "),
    ],
)
def test_a_file_without_documents_is_refused(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        made(tmp_path / name)
    assert said in caught.value.message
    assert caught.value.hint


def test_a_bad_file_of_questions_names_its_place(tmp_path: Path) -> None:
    document, asked = tmp_path / "doc.txt", tmp_path / "q.jsonl"
    document.write_text("Some text.", encoding="utf-8")
    for row, said in (
        ({"question": "When?", "answer": 1969}, f"question 2 of {asked}: its answer is no string"),
        ({"answer": "Vera"}, f"line 3 of {asked} has no question"),
    ):
        lines(asked, '"Who?"', "", row)
        with pytest.raises(UsageError) as caught:
            made(document, asked=asked)
        assert caught.value.message.startswith(said)
    for given in ({"path": Path("-"), "asked": asked}, {"path": document, "asked": Path("-")}):
        with pytest.raises(UsageError, match="not standard input"):
            made(**given)
    with pytest.raises(UsageError, match="reads a file of documents"):
        made(None)


# ---- a run -------------------------------------------------------------------------------------


class Listener(Silent):
    """Says nothing."""

    def document(self, index: int, name: str, tokens: int) -> None:
        pass

    def cell(self, results: Results, method: str, ratio: float | None) -> None:
        pass


REGISTER = generate(5, 60)


def asked_of(model: str, file: Path, methods: Sequence[str], ratio: float = 4) -> Any:
    settings, loaded = Settings.of(base.get("qa"), methods, [ratio], path=file), boxes.model(model)
    return settings, loaded, *runner.prepare(settings, loaded)


def run(model: str, file: Path, methods: Sequence[str], ratio: float = 4) -> Results:
    settings, loaded, documents, results = asked_of(model, file, methods, ratio)
    runner.run(settings, loaded, documents, results, Listener(), lambda: None)
    return results


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny documents, with questions that are answered wrongly, rightly and not at all."""
    asked = [{"question": NOBODY, "answer": "a fox", "kind": "pet"}, "Who is it about?"]
    return lines(
        tmp_path_factory.mktemp("qa") / "qa.jsonl",
        {"name": "one", "text": REGISTER.text, "questions": [*asked, "What is said first?"]},
        {"name": "two", "text": generate(6, 50).text, "questions": asked},
    )


@pytest.fixture(scope="module")
def measured(tiny: Path) -> Results:
    return run("pocket", tiny, ["keep", "knorm"])


def value(row: Any, name: str) -> float:
    return float(row[name]["value"])


def test_anchors_of_own_answers(measured: Results) -> None:
    rows = {(row["method"], row["kind"]): row for row in measured.rows()}
    for method in ("full", "keep"):
        row = rows[method, "all"]
        assert (value(row, "same"), value(row, "own_agreement")) == (1, 1)
        for name in ("lost", "own_lost", "own_kl", "kl"):
            assert value(row, name) == pytest.approx(0, abs=1e-5)
    assert (rows["full", "all"]["prefills"], rows["full", "all"]["recall"]) == (None, None)
    for kind in ("all", "pet", "question"):
        for name in ("lost", "own_lost"):
            assert rows["none", kind][name] == {"value": 1, "low": 1, "high": 1}
    assert value(rows["none", "all"], "same") < 1
    assert value(rows["knorm", "all"], "lost") > 0
    assert rows["knorm", "all"]["output_error"] is None or rows["knorm", "all"]["output_error"] > 0


def test_what_is_said_is_what_is_generated(tiny: Path, measured: Results) -> None:
    loaded = boxes.model("pocket")
    checked = 0
    for number, document in enumerate(made(tiny)):
        context = prefill(loaded, Source(document.name, document.text))
        prompts = [loaded.chat.first_turn(q.text) for q in document.questions]
        most = [q.max_tokens for q in document.questions]
        whole = answers(loaded, makers.whole(context).cache, prompts, most)
        nothing = answers(loaded, makers.nothing(loaded, 0).cache, prompts, most)
        right = [q.answer or own for q, own in zip(document.questions, whole, strict=True)]
        for method, texts in (("full", whole), ("none", nothing)):
            cell = measured.cells[number, method, None]
            assert cell["said"] == [
                [round(scorers.f1(text, answer), 6), scorers.contains(text, answer)]
                for text, answer in zip(texts, right, strict=True)
            ]
            same = [float(text == own) for text, own in zip(texts, whole, strict=True)]
            assert [outcome[0] for outcome in cell["own"]] == same
            checked += 1
        # Without an answer of one's own, the whole document's counts, and says all of itself.
        full = measured.cells[number, "full", None]
        assert full["said"][1] == [1.0, 1.0]
        assert full["said"][0] != [1.0, 1.0]
        assert full["outcomes"][1][1:] == pytest.approx(full["own"][1][1:], rel=1e-4)
        assert full["outcomes"][0][1:] != pytest.approx(full["own"][0][1:], rel=1e-2)
    assert checked == 4


def test_answers_that_come_out_again_are_not_generated(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[int] = []

    def counted(loaded: Any, cache: Any, prompts: Any, most: Any, **more: Any) -> list[str]:
        generated.append(len(prompts))
        return answers(loaded, cache, prompts, most, **more)

    monkeypatch.setattr(runner, "answers", counted)
    settings, loaded, documents, _ = asked_of("pocket", tiny, ["keep", "knorm"])
    bench = runner._Bench.of(settings, loaded, documents[0], Listener())
    for method, ratio in (("full", None), ("keep", 1.0)):
        bench.cell(method, ratio)
        assert generated == []
    found = bench.cell("none", None)
    own = bench.teacher.measure(makers.nothing(loaded, 0).cache)[len(documents[0].questions) :]
    others = sum(not outcome.exact for outcome in own)
    assert generated == ([others] if others else [])
    assert others > 0
    assert sum(outcome[0] for outcome in found["own"]) <= len(own)


def test_any_model_measures_own_answers(tiny: Path) -> None:
    for name in ("llama", boxes.RAW):
        rows = {row["method"]: row for row in run(name, tiny, ["keep"]).rows()}
        assert value(rows["keep"], "same") == 1
        assert rows["none"]["own_lost"] == {"value": 1, "low": 1, "high": 1}


def test_a_document_that_says_nothing_at_all_is_measured(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a template an empty answer is no token but its end."""

    def silent(loaded: Any, cache: Any, prompts: Any, most: Any, **more: Any) -> list[runner.Reply]:
        return [runner.Reply([], True, "") for _ in prompts]

    monkeypatch.setattr(runner, "replies", silent)
    row = run(boxes.RAW, tiny, ["keep"]).row("full", None, "question")
    assert row is not None
    assert value(row, "nll") > 0
    assert value(row, "own_nll") > 0
    # Whatever was said; it is not generated again for the context that said it.
    assert (value(row, "same"), value(row, "f1"), value(row, "contains")) == (1, 1, 1)


# ---- the command -------------------------------------------------------------------------------


def test_a_document_with_questions_is_typed_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("doc.txt").write_text(REGISTER.text, encoding="utf-8")
    lines(Path("q.jsonl"), {"question": NOBODY, "answer": "a fox"}, '"Who is it about?"')
    words = ["eval", "doc.txt", "--questions", "q.jsonl", "--model", "pocket", "--ratio", "4"]
    words += ["--method", "knorm", "-o", "r.json"]
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["settings"]["suite"] == "qa"
    assert (record["settings"]["file"], record["settings"]["questions"]) == ("doc.txt", None)
    assert [row["questions"] for row in record["rows"]] == [2, 2, 2]
    assert main(words) == 0
    head, full = capsys.readouterr().out.splitlines()[:2]
    assert head.split()[4:12] == [
        "lost", "same", "F1", "contains", "NLL", "KL", "top-1", "seconds",
    ]  # fmt: skip
    assert full.startswith("full context")

    lines(Path("q.jsonl"), {"question": NOBODY, "answer": "an owl"}, '"Who is it about?"')
    assert main(words) == 2
    assert "r.json was made with other settings: asked_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("doc.txt", "--questions", "q.jsonl", "--suite", "register"), "suite register takes no"),
        (("doc.txt", "--questions", "q.jsonl", "--suite", "perplexity"), "suite perplexity takes"),
        (("--suite", "qa"), "suite qa wants a file: JSON lines of documents"),
        (("--questions", "q.jsonl"), "suite qa wants a file: JSON lines of documents"),
        (("doc.txt", "--suite", "qa"), "line 1 of doc.txt is not JSON"),
        (("doc.txt", "--questions", "gone.jsonl"), "no such file: gone.jsonl"),
        (("gone.txt", "--questions", "q.jsonl"), "no such file: gone.txt"),
        (("-", "--questions", "q.jsonl"), "amkv eval reads files, not standard input"),
        (("doc.txt", "--questions", "0"), "--questions 0 is below 1"),
        (("doc.txt", "--questions", "q.jsonl", "--tokens", "9"), "suite qa reads whole documents"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_what_makes_no_sense_is_one_line_and_a_hint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("doc.txt").write_text("Some text.", encoding="utf-8")
    lines(Path("q.jsonl"), '"Who?"')
    assert main(["eval", *words, "--model", "pocket"]) == 2
    found = capsys.readouterr().err.splitlines()
    assert found[0].startswith(f"error: {said}")
    assert [line.partition(":")[0] for line in found] == ["error", "hint"]
