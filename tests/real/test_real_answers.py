"""What pretrained models answer from a compact context, by the suite that users have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amcli.evaluation import runner
from amcli.evaluation.results import Results
from amcli.evaluation.settings import Settings
from amcli.evaluation.suites import base
from amcli.evaluation.suites.base import Wanted
from amcli.models.loading import load
from amcli.system.progress import Silent

LOST = {"smollm2": 0.02, "qwen0.5b": 0.01}
"""What `omp` may lose at 10×, as a share of what no context loses; 0.0054 and 0.0015 were seen."""


class Listener(Silent):
    """Is told of documents and cells, and does nothing."""

    def document(self, index: int, name: str, tokens: int) -> None:
        """Nothing."""

    def cell(self, results: Results, method: str, ratio: float | None) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def results(name: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A generated document of some 500 tokens, and nine questions about it."""
    loaded = load(str(folder), device="cpu", dtype="float32")
    request = Wanted(docs=1, questions=3, tokens=500, seed=5, measure=runner.measure_of(loaded))
    [document] = base.get("register").documents(request)
    asked = [{"question": q.text, "answer": q.answer} for q in document.questions]
    row = {"name": "register", "text": document.text, "questions": asked}
    file = tmp_path_factory.mktemp("questions") / "qa.jsonl"
    file.write_text(json.dumps(row), encoding="utf-8")
    settings = Settings.of(base.get("qa"), ["keep", "omp", "kvzip"], [10.0], path=file)
    documents, results = runner.prepare(settings, loaded)
    runner.run(settings, loaded, documents, results, Listener(), lambda: None)
    return results


def lost(results: Results, method: str, ratio: float) -> float:
    row = results.row(method, ratio, "all")
    assert row is not None
    return float(row["lost"]["value"])


def test_keeping_everything_loses_nothing(results: Results) -> None:
    row = results.row("keep", 1.0, "all")
    assert row is not None
    assert row["same"]["value"] == 1
    assert row["lost"]["value"] < 1e-4
    assert row["own_lost"]["value"] < 1e-4


def test_ten_times_smaller_stays_within_what_was_recorded(name: str, results: Results) -> None:
    assert lost(results, "omp", 10.0) < LOST[name]
    assert lost(results, "omp", 10.0) < lost(results, "kvzip", 10.0)
