"""The file of results: what is no finite number, and what a run may go on from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import boxes
import pytest

from amcli.commands.eval_table import Notes, Pace, table_text
from amcli.commands.screen.console import Console, Switches
from amcli.errors import UsageError
from amcli.evaluation import parallel, runner
from amcli.evaluation.results import Results, finite
from amcli.evaluation.settings import Settings
from amcli.evaluation.suites import base
from amcli.pipeline.contexts.forcing import Outcome

Row = dict[str, Any]


def cell(
    document: int, method: str, ratio: float | None, kl: float, score: float | None = 1.0
) -> Row:
    outcomes = [runner.cell_of(score, Outcome(True, kl, kl, 2, 2, None))] * 2
    found = {
        "document": document, "method": method, "ratio": ratio, "budget": None,
        "stored_bytes": 10, "full_bytes": 100, "output_error": None, "outcomes": outcomes,
        "seconds": {"reference": 1.0, "compact": 3.0, "questions": 50.0},
    }  # fmt: skip
    return dict(finite(found))


def results(documents: int = 1, tokens: int = 100) -> Results:
    made: list[Row] = [
        {"name": f"d{i}", "tokens": tokens * (i + 1), "sha256": f"{i}", "seconds": {"prefill": 2.0}}
        for i in range(documents)
    ]
    settings = {"seed": 0, "methods": [["omp", [5.0]]]}
    return Results(settings, "here", {}, made, [["x", "x"]] * documents)


def filled(**kls: float) -> Results:
    found = results()
    for (method, kl), ratio in zip(kls.items(), (None, None, 5.0), strict=True):
        found.cells[0, method, ratio] = cell(0, method, ratio, kl)
    return found


# ---- what is not finite ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_the_file_and_nan_in_the_table(
    bad: float, tmp_path: Path
) -> None:
    made, path = filled(full=0.0, none=2.0, omp=bad), tmp_path / "r.json"
    made.write(path)
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["cells"][2]["outcomes"] == [[1.0, None, None, 2, 2]] * 2
    again = results()
    again.resume(path)
    assert again.rows() == made.rows()
    row = again.rows()[2]
    nothing = {"value": None, "low": None, "high": None}
    assert (row["nll"], row["kl"], row["lost"]) == (nothing, nothing, nothing)
    assert row["recall"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    json.dumps(again.record(cells=False), allow_nan=False)  # what --json prints
    head, _, none, omp = table_text(again.rows()).splitlines()
    heads = ["method", "ratio", "real", "stored", "recall", "lost", "NLL", "KL", "top-1"]
    assert head.split() == [*heads, "seconds", "prefills"]
    assert omp.split()[7:] == ["nan", "nan", "nan", "1.000", "4.0", "2.0"]
    assert "nan" not in none


def test_an_interval_without_an_upper_end_is_shown_without_one() -> None:
    found = filled(full=0.0, none=0.0, omp=1.0)
    none = found.cells[0, "none", None]
    none["outcomes"] = [none["outcomes"][0], [1.0, 2.0, 2.0, 2, 2]]
    row = found.rows()[2]
    # Where a question is drawn twice that no context does not lose on, nothing is to divide by.
    assert row["lost"]["value"] == 1.0
    assert (row["lost"]["low"], row["lost"]["high"]) == (0.5, None)
    for row in found.rows():  # no scores: the table has what is lost with its interval
        row["recall"] = None
    assert "1.000" in table_text(found.rows()).splitlines()[3]


def test_times_are_over_prefills_and_without_questions() -> None:
    row = filled(full=0.0, none=1.0, omp=1.0).rows()[2]
    assert row["prefills"] == 2.0
    assert row["output_error"] is None
    two = results(2)
    for document, error in ((0, 0.1), (1, 0.3)):
        two.cells[document, "omp", 5.0] = {**cell(document, "omp", 5.0, 1.0), "output_error": error}
    found = two.row("omp", 5.0, "all")
    assert found is not None
    assert found["output_error"] == pytest.approx(0.2)
    assert found["lost"] is None  # no context was not measured yet
    two.cells[1, "omp", 5.0]["output_error"] = None
    found = two.row("omp", 5.0, "all")
    assert found is not None
    assert found["output_error"] is None


def test_json_of_a_run_that_found_no_numbers_is_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from amcli.commands.app import main

    def broken(score: float | None, outcome: Outcome) -> list[float | None]:
        return [score, math.nan, math.inf, outcome.agree, outcome.tokens]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "cell_of", broken)
    words = ["eval", "--docs", "1", "--questions", "1", "--tokens", "150", "--method", "knorm"]
    words += ["--ratio", "5", "--model", "pocket", "--json", "-q", "-o", "r.json"]
    for _ in range(2):  # measured, and read back
        assert main(words) == 0
        out = capsys.readouterr().out
        record = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert {row["kl"]["value"] for row in record["rows"]} == {None}


# ---- going on ----------------------------------------------------------------------------------


def test_another_text_under_the_same_name_is_refused(tmp_path: Path) -> None:
    """The file of documents is the same, the one that it names is not."""
    (tmp_path / "doc.txt").write_text("The fox is red.", encoding="utf-8")
    file = tmp_path / "qa.jsonl"
    file.write_text('{"path": "doc.txt", "questions": ["What?"]}\n', encoding="utf-8")
    loaded = boxes.model("pocket")
    settings = Settings.of(base.get("qa"), ["knorm"], [2], path=file)
    _, first = runner.prepare(settings, loaded)
    first.write(tmp_path / "r.json")
    _, again = runner.prepare(settings, loaded)
    again.resume(tmp_path / "r.json")

    (tmp_path / "doc.txt").write_text("The cat is red.", encoding="utf-8")
    _, other = runner.prepare(settings, loaded)
    assert other.documents[0]["tokens"] == first.documents[0]["tokens"]
    with pytest.raises(UsageError, match="other settings: the documents and questions"):
        other.resume(tmp_path / "r.json")

    file.write_text('{"path": "doc.txt", "questions": ["Who?"]}\n', encoding="utf-8")
    _, other = runner.prepare(settings, loaded)
    with pytest.raises(UsageError, match=r"file_sha256 [0-9a-f]{64} there"):
        other.resume(tmp_path / "r.json")


# ---- the time that is left ---------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("amcli.commands.eval_table.time.monotonic", lambda: now[0])
    return now


def measure(found: Results, document: int) -> None:
    for method, ratio in found.todo(document):
        found.cells[document, method, ratio] = cell(document, method, ratio, 1.0)


def test_time_left_goes_by_tokens_and_cells_of_this_run(clock: list[float]) -> None:
    found, pace = results(3), Pace()  # 100, 200 and 300 tokens, three cells each
    assert pace.left(found) is None
    clock[0] += 5
    assert pace.left(found) is None  # no cell: nothing to go by
    measure(found, 0)
    clock[0] += 5
    assert pace.left(found) == pytest.approx(10 * (3 * 500) / (3 * 100))
    measure(found, 1)
    clock[0] += 20
    assert pace.left(found) == pytest.approx(30 * (3 * 300) / (3 * 300))
    measure(found, 2)
    assert pace.left(found) == 0


def test_cells_that_were_there_took_no_time_of_this_run(clock: list[float]) -> None:
    found = results(3)
    measure(found, 0)
    pace = Pace()
    clock[0] += 1000  # between making it and the first look: not the run's
    assert pace.left(found) is None
    clock[0] += 8
    assert pace.left(found) is None
    measure(found, 1)
    assert pace.left(found) == pytest.approx(8 * (3 * 300) / (3 * 200))


def test_notes_say_what_is_left_from_the_second_document_on(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("amcli.commands.screen.console.switches", Switches())
    found = results(2)
    with Notes(Console(), found) as notes:
        notes.document(0, "d0", 100)
        clock[0] += 40
        measure(found, 0)
        notes.document(1, "d1", 200)
    assert capsys.readouterr().err.splitlines() == [
        "document 1 of 2: d0, 100 tokens",
        "document 2 of 2: d1, 200 tokens, about 80 s left",
    ]


# ---- several GPUs ------------------------------------------------------------------------------


def test_processes_take_turns_on_the_gpus_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = parallel.Spec("pocket", None, "float32")
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 2)
    places = parallel.spread(spec, 3)
    assert [place.device for place in places] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {(place.model, place.dtype, place.trust) for place in places} == {
        ("pocket", "float32", False)
    }
    for device in ("cpu", "cuda:1", "cuda"):
        named = parallel.Spec("pocket", device, None)
        assert parallel.spread(named, 3) == [named] * 3
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 0)
    assert parallel.spread(spec, 2) == [spec] * 2


def test_each_process_is_given_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []

    class Process:
        exitcode = 0

        def __init__(self, target: Any, args: Any, daemon: bool) -> None:
            jobs.append(args[0])

        def start(self) -> None: ...
        def terminate(self) -> None: ...
        def join(self) -> None: ...

    context = parallel.multiprocessing.get_context("spawn")
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel, "gather", lambda *given: None)
    monkeypatch.setattr(context, "Process", Process, raising=False)
    monkeypatch.setattr(parallel.multiprocessing, "get_context", lambda kind: context)
    loaded, asked = boxes.model("pocket"), Settings.of(base.get("register"), ["knorm"], [5])

    class Listener(runner.Listener):
        def start(self, stage: str, total: int) -> None:
            assert (stage, total) == ("3 at a time", 12)

    found, spec = results(4), parallel.Spec("pocket", None, None)
    parallel.run(asked, loaded, spec, [None] * 4, found, Listener(), lambda: None, jobs=3)  # type: ignore[list-item]
    assert [job.spec.device for job in jobs] == ["cuda:0", "cuda:1", "cuda:0"]
