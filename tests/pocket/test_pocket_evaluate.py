"""The evaluation counts what it says it counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pocketbox import sampler

from amcli.generator.dialogues import QUESTION_KINDS, Question
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.contexts.context import Context
from amcli.trainer import evaluate


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("pocket", device="cpu")


def test_the_report_of_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recall.json"
    options = ["--lengths", "500", "--documents", "2", "--questions", "1", "--json", str(file)]
    evaluate.main(options)
    report = json.loads(file.read_text())
    assert [row["kind"] for row in report["results"]] == list(QUESTION_KINDS)
    for row in report["results"]:
        assert (row["tokens"], row["asked"]) == (500, 2)
        assert 300 < row["mean_tokens"] <= 500
        assert row["recall"] == 1.0
        assert row["recall_without_document"] <= 0.5
    assert report["wrong"] == []
    assert {"date", "hardware", "versions", "seeds", "dtype", "threads"} <= report.keys()
    assert "500 tokens:" in capsys.readouterr().out


def test_an_answer_counts_only_if_it_is_whole(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(context: Context, questions: Sequence[Question]) -> Iterator[str]:
        """With a document every other answer is cut short; without one all are right."""
        empty = context.document_start == context.document_end
        for i, question in enumerate(questions):
            yield question.answer if empty or i % 2 else question.answer[:-1]

    monkeypatch.setattr(evaluate, "answers", half)
    found = evaluate.evaluate(loaded, 500, documents=1, count=4)
    for score in found.scores.values():
        assert (score.asked, score.right, score.guessed) == (4, 2, 4)
        assert score.row()["recall"] == 0.5
    assert len(found.wrong) == 6
    assert all(miss["said"] == miss["answer"][:-1] for miss in found.wrong)


def test_documents_are_not_those_of_training(loaded: LoadedModel) -> None:
    text, questions = evaluate.draw(1024, 0, sampler(), 3)
    assert evaluate.draw(1024, 0, sampler(), 3) == (text, questions)
    assert evaluate.draw(1024, 1, sampler(), 3)[0] != text
    assert len(sampler().encode(text)) <= 1024
    assert [q.kind for q in questions] == [kind for kind in QUESTION_KINDS for _ in range(3)]
