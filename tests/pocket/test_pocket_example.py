"""The example handbook: its files, its twenty questions, and that the model answers them all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from pocketbox import sampler

from amcli.generator.example import HANDBOOK, QUESTIONS, handbook, main, questions
from amcli.models.loading import load
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import read_source
from amcli.pipeline.talk.session import Session

FOLDER = Path(__file__).parents[2] / "docs" / "examples"


def test_the_files_are_what_the_generator_gives(tmp_path: Path) -> None:
    main([str(tmp_path / "new")])
    for name in (HANDBOOK, QUESTIONS):
        assert (FOLDER / name).read_bytes() == (tmp_path / "new" / name).read_bytes(), name


def test_the_handbook_is_long_and_about_everything() -> None:
    document = handbook()
    assert 3000 <= len(sampler().encode(document.text)) <= 5000
    assert {f.kind.name for f in document.facts} == {"person", "service", "site", "team"}


def test_there_are_twenty_varied_questions() -> None:
    rows = [json.loads(line) for line in (FOLDER / QUESTIONS).read_text().splitlines()]
    assert all(set(row) == {"question", "answer", "kind"} for row in rows)
    assert Counter(row["kind"] for row in rows) == {"direct": 14, "reverse": 3, "two-hop": 3}
    assert len({row["question"] for row in rows}) == len({row["answer"] for row in rows}) == 20
    asked = [q for q in questions() if q.kind == "direct"]
    kinds = {f.kind.name for f in handbook().facts for q in asked if f.subject in q.question}
    assert kinds >= {"person", "service", "site"}


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(load("pocket", device="cpu"), read_source(str(FOLDER / HANDBOOK)))


def test_with_the_whole_handbook_every_answer_is_right(context: Context) -> None:
    for question in questions():
        assert "".join(Session(context).ask(question.question)) == question.answer


def test_several_turns_in_one_conversation(context: Context) -> None:
    session = Session(context)
    for question in questions()[::4]:
        assert "".join(session.ask(question.question)) == question.answer
