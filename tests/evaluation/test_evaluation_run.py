"""Runs on pocket: anchors, controls, what repeats, what resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boxes
import pytest

from amcli.errors import UsageError
from amcli.evaluation import makers, runner
from amcli.evaluation.results import Results
from amcli.evaluation.settings import Settings
from amcli.evaluation.suites import base
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.queries.passes import Passes
from amcli.system.progress import Silent

METHODS = ("keep", "highest-attention", "shuffled")


class Listener(Silent):
    """Stops a run after some cells."""

    def __init__(self, cells: int = 10**6):
        self.left = cells

    def document(self, index: int, name: str, tokens: int) -> None:
        pass

    def cell(self, results: Results, method: str, ratio: float | None) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def settings(methods: Sequence[str] = METHODS, ratios: Sequence[float] = (10,), **more: Any) -> Any:
    options = {"docs": 2, "questions": 3, "tokens": 250, **more}
    return Settings.of(base.get("register"), methods, ratios, **options)


def run(path: Path | None = None, cells: int = 10**6, **more: Any) -> Results:
    asked, loaded = settings(**more), boxes.model("pocket")
    documents, results = runner.prepare(asked, loaded)
    if path is not None:
        results.resume(path)
    save = (lambda: None) if path is None else (lambda: results.write(path))
    runner.run(asked, loaded, documents, results, Listener(cells), save)
    return results


def timeless(record: Any) -> Any:
    """Without times: all that two runs may differ in."""
    if isinstance(record, dict):
        times = ("seconds", "prefills")
        return {key: timeless(value) for key, value in record.items() if key not in times}
    return [timeless(value) for value in record] if isinstance(record, list) else record


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that nothing stopped."""
    path = tmp_path_factory.mktemp("whole") / "results.json"
    run(path)
    return path


def rows(path: Path) -> dict[str, dict[str, Any]]:
    record = json.loads(path.read_text(encoding="utf-8"))
    return {row["method"]: row for row in record["rows"] if row["kind"] == "all"}


def test_keeping_everything_is_the_full_context(whole: Path) -> None:
    found = rows(whole)
    assert found["keep"]["recall"] == found["full"]["recall"]
    assert found["keep"]["kl"]["high"] < 1e-6
    assert found["keep"]["agreement"]["value"] == 1
    assert found["keep"]["stored_bytes"] == found["full"]["stored_bytes"]
    assert (found["full"]["real_ratio"], found["none"]["real_ratio"]) == (1.0, None)


def test_the_yardstick_can_fail(whole: Path) -> None:
    found = rows(whole)
    assert found["full"]["recall"]["value"] > 0.9
    assert found["highest-attention"]["recall"]["value"] > 0.8
    assert found["shuffled"]["recall"]["value"] <= found["none"]["recall"]["value"] + 0.1
    assert found["shuffled"]["nll"]["value"] > found["none"]["nll"]["value"] / 2
    assert found["none"]["recall"]["value"] < 0.1


def test_rows_say_what_was_measured(whole: Path) -> None:
    row = rows(whole)["highest-attention"]
    assert row["real_ratio"] == pytest.approx(10, rel=0.02)
    assert (row["documents"], row["questions"]) == (2, 18)
    assert row["recall"]["low"] <= row["recall"]["value"] <= row["recall"]["high"]
    assert set(row["seconds"]) == {"prefill", "reference", "compact", "questions"}
    record = json.loads(whole.read_text(encoding="utf-8"))
    kinds = {row["kind"] for row in record["rows"]}
    assert kinds == {"all", "direct", "reverse", "two-hop"}


@pytest.mark.parametrize("cells", [1, 7])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    whole: Path, tmp_path: Path, cells: int
) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        run(path, cells)
    stopped = json.loads(path.read_text(encoding="utf-8"))
    assert (stopped["complete"], len(stopped["cells"]), stopped["rows"]) == (False, cells, [])
    run(path)
    resumed = json.loads(path.read_text(encoding="utf-8"))
    assert timeless(resumed) == timeless(json.loads(whole.read_text(encoding="utf-8")))
    assert resumed["cells"][:cells] == stopped["cells"]  # with their seconds: not measured again
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_finished_run_is_read_back_byte_for_byte(whole: Path, tmp_path: Path) -> None:
    before = whole.read_bytes()
    run(whole, cells=0)  # would stop at the first cell
    copy = tmp_path / "copy.json"
    results = run(whole, cells=0)
    results.write(copy)
    assert before == whole.read_bytes() == copy.read_bytes()


def test_methods_and_ratios_may_be_added(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "grown.json"
    path.write_bytes(whole.read_bytes())
    found = run(path, cells=2, methods=(*METHODS, "knorm"))  # one new cell a document
    assert timeless(found.row("shuffled", 10.0, "all")) == timeless(rows(whole)["shuffled"])
    with pytest.raises(UsageError) as caught:
        run(path)
    assert "it has knorm at 10×" in caught.value.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"tokens": 260}, "tokens 250 there, 260 here"),
        ({"budget": "uniform"}, "budget null there, uniform here"),
        ({"ratios": (7,)}, "it has highest-attention at 10×"),
    ],
)
def test_other_settings_are_refused(whole: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(whole, **change)
    assert said in caught.value.message
    assert (caught.value.code, caught.value.field) == ("results-of-other-settings", "path")


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    for content in ("{}", "[1]", "no JSON"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UsageError, match="is not the result of an evaluation") as caught:
            run(path)
        assert caught.value.code == "not-results"
        assert path.read_text(encoding="utf-8") == content


def test_a_summary_takes_no_more_bytes_than_it_may() -> None:
    context = prefill(boxes.model("llama"), boxes.source(300))
    size = context.T
    for ratio in (2.0, 10.0, float(size)):
        made = makers.make(
            context, Request(ratio=ratio, method="summary"), Passes(context), Silent()
        )
        # Less than the opening of the chat cannot be stored.
        least = len(context.loaded.chat.open_document("").ids)
        assert made.cache.get_seq_length() <= max(size / ratio, least)
        assert made.stored_bytes * size == made.full_bytes * made.cache.get_seq_length()
    # A random model never stops: its summary is cut where the bytes end.
    made = makers.make(context, Request(ratio=2.0, method="summary"), Passes(context), Silent())
    assert made.ratio == pytest.approx(2, rel=0.15)


def test_every_suite_runs_on_any_model(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(boxes.source(200).text, encoding="utf-8")
    loaded = boxes.model("llama")
    for suite, more in (
        ("needle", {"tokens": 300}),
        ("perplexity", {"tokens": 300, "path": book}),
    ):
        asked = Settings.of(base.get(suite), ["keep"], [5], docs=1, **more)
        documents, results = runner.prepare(asked, loaded)
        runner.run(asked, loaded, documents[:2], results, Listener(), lambda: None)
        row = results.row("keep", 1.0, "all")
        assert row is not None
        assert row["kl"]["value"] < 1e-6
        assert row["nll"]["value"] > 0
        assert (row["recall"] is None) == (suite == "perplexity")


def test_settings_that_make_no_sense_are_refused_before_any_work(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("register", {"path": tmp_path}, "takes no file"),
        ("quality", {}, "wants a file: QuALITY"),
        ("quality", {"path": tmp_path, "tokens": 5}, "reads whole documents"),
        ("register", {"reason": True}, "no multiple choice"),
        ("register", {"budget": "fair"}, "unknown budget 'fair'"),
        ("register", {"queries": "none"}, "unknown reference queries 'none'"),
    ]
    for suite, more, said in cases:
        with pytest.raises(UsageError) as caught:
            Settings.of(base.get(suite), ["omp"], [5], **more)
        assert said in caught.value.message
    with pytest.raises(UsageError) as caught:
        Settings.of(base.get("register"), ["opm"], [5])
    assert (caught.value.hint or "").endswith("summary, shuffled")


def test_documents_that_do_not_fit_are_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="positions"):
        runner.prepare(settings(tokens=17_000, docs=1), boxes.model("pocket"))
    with pytest.raises(UsageError, match="more than the context has tokens"):
        runner.prepare(settings(ratios=(1000,)), boxes.model("pocket"))
