"""demo: the main job on an example, with its numbers, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from helptext import documented

from amcli.generator import example
from amcli.generator.dialogues import QUESTION_KINDS, Question
from amcli.generator.documents import Document
from amcli.pipeline.compaction import compacting as compaction
from amcli.system.memory import state_folder
from amkv_format import AmkvFile
from conftest import Amkv


@pytest.fixture(autouse=True)
def small(
    document: Document, question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document of 300 tokens for the example, and a temporary folder to look into."""
    asked = [question, Question("Who is nobody?", "Nobody", "reverse"), question]
    monkeypatch.setattr(example, "handbook", lambda: document)
    monkeypatch.setattr(example, "questions", lambda: asked)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))


def test_it_shows_answers_sizes_and_seconds(
    amkv: Amkv, here: Path, tmp_path: Path, question: Question
) -> None:
    done = amkv("demo", "--ratio", "2")
    assert done.code == 0
    assert question.question in done.out
    assert re.search(rf"✓ whole, [0-9.]+ MB: +{re.escape(question.answer)}\n", done.out)
    assert max(map(len, done.out.splitlines())) <= 80
    assert "✗" in done.out  # nobody knows nobody
    assert "right would be:    Nobody" in done.out
    assert "right from the compact file" in done.out.splitlines()[-5]
    assert os.listdir(here) == ["doc.txt"]
    assert os.listdir(tmp_path / "temporary") == []
    assert not (state_folder() / "last-prefill").exists()


def test_json(amkv: Amkv, question: Question) -> None:
    record = json.loads(amkv("demo", "--ratio", "12", "--json").out)
    assert "files" not in record
    assert record["ratio"] == pytest.approx(12, rel=0.02)
    assert record["ratio"] == round(record["full_bytes"] / record["stored_bytes"], 4) >= 12
    assert {*record, "files"} == documented("demo")
    first, second = record["questions"]
    assert (first["kind"], first["from_document"]) == ("direct", question.answer)
    assert first["document_right"] is True
    assert second["document_right"] is False
    stages = set(record["seconds"])
    assert stages == {"load", "prefill", "ask_full", "compact", "ask_compact", "total"}


def test_keep_leaves_three_files_that_work(amkv: Amkv, question: Question) -> None:
    record = json.loads(amkv("demo", "--ratio", "2", "--keep", "some/where", "--json").out)
    assert sorted(os.listdir("some/where")) == [
        "handbook.amkv",
        "handbook.prefill.amkv",
        "handbook.txt",
    ]
    for path in record["files"][1:]:
        with AmkvFile.open(path) as file:
            file.verify()
    full = amkv("chat", "-c", record["files"][1], "-p", question.question)
    assert full.out == question.answer + "\n"


def test_an_interrupted_demo_leaves_nothing(
    amkv: Amkv, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compaction, "compact", interrupt)
    for words in (("demo",), ("demo", "--keep", "kept")):
        assert amkv(*words).code == 130
        assert os.listdir(here) == ["doc.txt"]
        assert os.listdir(tmp_path / "temporary") == []


def test_the_model_of_the_environment_is_not_used(
    amkv: Amkv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMKV_MODEL", "./no-such-model")
    assert amkv("demo", "--ratio", "2").code == 0


def test_the_questions_are_the_first_of_each_kind(
    amkv: Amkv, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        Question(f"Who {i}?", "-", kind)
        for i, kind in enumerate((*QUESTION_KINDS, *QUESTION_KINDS[::-1]))
    ]
    monkeypatch.setattr(example, "questions", lambda: asked)
    record = json.loads(amkv("demo", "--ratio", "2", "--json").out)
    shown = [(q["question"], q["kind"]) for q in record["questions"]]
    assert shown == [(f"Who {i}?", kind) for i, kind in enumerate(QUESTION_KINDS)]
