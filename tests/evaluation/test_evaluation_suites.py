"""Every suite makes items that can be answered from the document, for any seed and length."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import boxes
import pytest

from amcli.errors import UsageError
from amcli.evaluation.runner import measure_of
from amcli.evaluation.suites import base
from amcli.evaluation.suites.base import Document, Measure, Wanted

WORDS = Measure(lambda texts: [len(text.split()) for text in texts])


def made(suite: str, **more: Any) -> list[Document]:
    options = {"docs": 1, "questions": None, "tokens": 600, "seed": 0, "measure": WORDS, **more}
    return base.get(suite).documents(Wanted(**options))


@pytest.mark.parametrize("suite", ["register", "needle", "ruler"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_seed_decides_and_the_length_is_kept(suite: str, seed: int) -> None:
    documents = made(suite, seed=seed)
    assert documents == made(suite, seed=seed)
    assert documents != made(suite, seed=seed + 10)
    assert all(300 < WORDS.one(document.text) <= 600 for document in documents)
    assert len({document.text for document in documents}) == len(documents)


@pytest.mark.parametrize("suite", ["register", "needle", "ruler"])
def test_lengths_are_in_the_models_own_tokens(suite: str) -> None:
    measure = measure_of(boxes.model("pocket"))
    for document in made(suite, measure=measure, tokens=700):
        assert 350 < measure.one(document.text) <= 700


def test_register_asks_three_kinds_about_what_the_document_says() -> None:
    [document] = made("register", questions=4)
    assert Counter(q.kind for q in document.questions) == {"direct": 4, "reverse": 4, "two-hop": 4}
    text = document.text.lower()
    assert all(q.answer.lower() in text for q in document.questions if q.kind == "direct")


def test_needles_lie_at_ten_depths() -> None:
    documents = made("needle", docs=2)
    assert len(documents) == 20
    for number, document in enumerate(documents):
        [question] = document.questions
        assert document.text.count(question.answer) == 1
        key = re.search(r"number for (.*)\?", question.text)
        assert key is not None
        assert f"for {key[1]} is {question.answer}." in document.text
        depth = document.text.index(question.answer) / len(document.text)
        assert depth == pytest.approx((number % 10) / 9, abs=0.12)


@pytest.mark.parametrize("seed", range(4))
def test_ruler_answers_follow_from_the_text(seed: int) -> None:
    for document in made("ruler", seed=seed, docs=2):
        [question] = document.questions
        assert set(SOLVERS[question.kind](document.text, question.text)) == set(question.references)
        assert question.answer == ", ".join(question.references)


def _magic(text: str, asked: str) -> list[str]:
    pairs = re.findall(r"magic numbers for (\w+ \w+) is (\d+)\.", text)
    assert len(pairs) == 4
    return [value for key, value in pairs if key in asked]


def _variables(text: str, asked: str) -> list[str]:
    wanted = re.search(r"value (\d+)", asked)
    assert wanted is not None
    values: dict[str, str] = {}
    for name, direct, other in re.findall(r"VAR (\w+) = (?:(\d+)|VAR (\w+))\.", text):
        values[name] = direct or values[other]  # a variable is assigned before it is used
    return [name for name, value in values.items() if value == wanted[1]]


def _common(text: str, asked: str) -> list[str]:
    words = re.findall(r"^\d+\. (\w+)$", text, re.MULTILINE)
    counts = Counter(words).most_common()
    assert counts[9][1] >= 10 * counts[10][1]
    return [word for word, _ in counts[:10]]


SOLVERS = {
    "multi-key": _magic,
    "multi-value": _magic,
    "multi-query": _magic,
    "variable-tracking": _variables,
    "common-words": _common,
}


def quality_file(folder: Path) -> Path:
    def entry(article: str, writer: int) -> dict[str, Any]:
        question = {
            "question": f"What does writer {writer} ask?",
            "options": ["one", " two ", "three", "four"],
            "gold_label": writer + 1,
            "difficult": writer % 2,
        }
        return {"article_id": article, "article": f"Text of {article}.", "questions": [question]}

    path = folder / "quality.dev"
    lines = [json.dumps(entry(a, w)) for a in ("17", "23") for w in (0, 1)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_quality_joins_the_two_lines_of_an_article(tmp_path: Path) -> None:
    documents = made("quality", path=quality_file(tmp_path), docs=50)
    assert [document.name for document in documents] == ["article 17", "article 23"]
    assert documents[0].text == "Text of 17."
    first, second = documents[0].questions
    assert (first.answer, second.answer) == ("A", "B")
    assert (first.kind, second.kind) == ("easy", "hard")
    assert "\n\nA. one\nB. two\nC. three\nD. four\n\n" in first.text
    assert first.text.endswith("(A, B, C or D) of the right option only.")
    assert first.said is None
    [thinking, *_] = made("quality", path=quality_file(tmp_path), reason=True)
    assert "step by step" in (thinking.questions[0].said or "")
    assert len(made("quality", path=quality_file(tmp_path), docs=1)) == 1


def longhealth_file(folder: Path, patients: int = 6) -> Path:
    def patient(number: int) -> dict[str, Any]:
        asked = {f"answer_{letter}": f"option {letter}" for letter in "abcde"}
        question = {**asked, "question": "Which one?", "correct": "option d "}
        return {
            "name": f"Name {number}",
            "birthday": "1970-01-01",
            "diagnosis": "Flu",
            "texts": {"text_0": "First note.", "text_1": f"Second note of {number}."},
            "questions": [question, question],
        }

    path = folder / "benchmark_v5.json"
    content = {f"patient_{i:02d}": patient(i) for i in range(patients, 0, -1)}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_longhealth_groups_five_patients_and_says_which_one_is_meant(tmp_path: Path) -> None:
    documents = made("longhealth", path=longhealth_file(tmp_path), docs=4)
    assert [d.name for d in documents] == ["patient_01 to patient_05", "patient_06"]
    assert documents[0].text.startswith("<text_0>\nFirst note.\n</text_0>\n\n<text_1>\nSecond note")
    assert documents[0].text.count("Second note") == 5
    assert len(documents[0].questions) == 10
    question = documents[0].questions[0]
    assert "ID patient_01, name: Name 1" in question.text
    assert (question.answer, len(question.options)) == ("D", 5)


@pytest.mark.parametrize(
    ("suite", "content", "said"),
    [
        ("quality", "{}", "line 1: no 'article_id'"),
        ("quality", "not JSON", "line 1"),
        ("quality", '{"article_id": 1, "article": "x", "questions": [{}]}', "article 1"),
        ("longhealth", "[]", "no document with questions"),
        ("longhealth", '{"patient_01": {"texts": {}}}', "patient_01: no 'questions'"),
        ("longhealth", "7", "the file"),
    ],
)
def test_a_file_of_another_form_is_refused(
    tmp_path: Path, suite: str, content: str, said: str
) -> None:
    path = tmp_path / "file"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        made(suite, path=path)
    assert said in caught.value.message


def test_perplexity_halves_windows_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    words = [f"word{i}" for i in range(250)]
    path.write_text(" ".join(words), encoding="utf-8")
    documents = made("perplexity", path=path, tokens=100, docs=9)
    assert [(WORDS.one(d.text), WORDS.one(d.questions[0].text)) for d in documents[:2]] == [
        (50, 50),
        (50, 50),
    ]
    whole = " ".join(d.text + d.questions[0].text for d in documents)
    assert whole.split() == words[: len(whole.split())]
    [short] = made("perplexity", path=path, tokens=10_000)
    assert (short.text + short.questions[0].text).split() == words
    assert abs(WORDS.one(short.text) - 125) <= 1
    path.write_text("too short", encoding="utf-8")
    with pytest.raises(UsageError, match="too short"):
        made("perplexity", path=path)


def test_a_list_too_short_to_have_common_words_is_refused() -> None:
    with pytest.raises(UsageError, match="does not fit into 50 tokens"):
        made("ruler", tokens=50)


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        base.get("quallity")
    assert "did you mean 'quality'?" in (caught.value.hint or "")


def test_a_cut_ends_with_a_word() -> None:
    text = "one two  three\nfour"
    assert WORDS.cut(text, 2) == "one two"
    assert WORDS.cut(text, 9) == text
    assert WORDS.cut(text, 0) == ""
