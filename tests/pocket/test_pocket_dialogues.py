"""Questions: exactly one right answer each, checked against every fact of the document."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import islice
from random import Random

import pytest

from amcli.generator.dialogues import QUESTION_KINDS, Question, Questioner, turns
from amcli.generator.documents import Document, Fact, generate
from amcli.generator.schema import PERSON
from amcli.pipeline.queries.prompts import ASK

SEEDS = [f"test/{i}" for i in range(8)]


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def every_reading(document: Document) -> dict[str, set[str]]:
    """Every question that any fact answers, with all its answers; made without `Questioner`."""
    answers: dict[str, set[str]] = defaultdict(set)
    of: dict[str, list[Fact]] = defaultdict(list)
    for fact in document.facts:
        of[fact.subject].append(fact)
        for wording in fact.attribute.direct:
            answers[wording.format(s=fact.subject)].add(fact.value)
        for wording in fact.attribute.reverse:
            answers[wording.format(v=fact.value)].add(fact.subject)
    for fact in document.facts:
        described = [(w.format(v=fact.value), fact.subject) for w in fact.attribute.relative]
        described += [(w.format(s=fact.subject), fact.value) for w in fact.attribute.described]
        for description, entity in described:
            for asked in of[entity]:
                statement = asked.attribute.statement.format(s=asked.subject, v=asked.value)
                for wording in asked.attribute.hop:
                    answers[wording.format(r=description)].add(capital(statement))
    return answers


@pytest.mark.parametrize("seed", SEEDS)
def test_a_question_has_exactly_one_right_answer(seed: str) -> None:
    document = generate(seed, 3000)
    answers, questioner, rng = every_reading(document), Questioner(document), Random(seed)
    for kind in QUESTION_KINDS:
        questions = questioner.distinct(rng, kind, 150)
        assert len(questions) > 50
        for question in questions:
            assert answers[question.question] == {question.answer}, question
            assert question.kind == kind


def fact(subject: str, attribute: str, value: str) -> Fact:
    found = next(a for a in PERSON.attributes if a.name == attribute)
    return Fact(PERSON, subject, found, value)


def asked(facts: list[Fact], kind: str) -> set[Question]:
    questioner, rng = Questioner(Document("", "", tuple(facts))), Random(0)
    return set(questioner.distinct(rng, kind, 200))


def test_what_two_people_share_is_not_asked_backwards() -> None:
    pair = [fact("Ann Lee", "pet", "an ox"), fact("Bo Ray", "pet", "an ox")]
    assert {q.answer for q in asked(pair, "direct")} == {"an ox"}
    assert not asked(pair, "reverse")
    assert {q.answer for q in asked([*pair, fact("Cy Fox", "pet", "a hen")], "reverse")} == {
        "Cy Fox"
    }
    homes = [*pair, fact("Ann Lee", "home", "Oban"), fact("Bo Ray", "home", "Deal")]
    two_hop = asked(homes, "two-hop")  # only through the homes, which differ
    assert two_hop
    assert {q.answer for q in two_hop} == {"Ann Lee keeps an ox.", "Bo Ray keeps an ox."}


def test_a_subject_with_two_values_is_not_asked_for_one() -> None:
    double = [fact("Ann Lee", "pet", "an ox"), fact("Ann Lee", "pet", "a hen")]
    for kind in QUESTION_KINDS:
        assert not asked(double, kind)


def test_no_facts_no_questions_and_no_dialogue() -> None:
    empty = Document("", "", ())
    assert [Questioner(empty).draw(Random(0), kind) for kind in QUESTION_KINDS] == [None] * 3
    assert list(turns(empty, Random(0))) == []


def test_distinct_questions_are_distinct_and_repeatable() -> None:
    questioner = Questioner(generate("x", 2000))
    first = questioner.distinct(Random(1), "direct", 30)
    assert len({q.question for q in first}) == len(first) == 30
    assert first == questioner.distinct(Random(1), "direct", 30)
    assert first != questioner.distinct(Random(2), "direct", 30)


def test_a_two_hop_answer_names_its_subject_first() -> None:
    document = generate("x", 2000)
    subjects = tuple(capital(f.subject) for f in document.facts)
    for question in Questioner(document).distinct(Random(0), "two-hop", 60):
        assert question.answer.startswith(subjects)


def test_dialogues_mix_all_kinds_and_the_reference_task() -> None:
    document = generate("x", 2000)
    kinds: Counter[str] = Counter()
    readings = every_reading(document)
    for seed in range(20):
        for turn in islice(turns(document, Random(seed)), 40):
            kinds[turn.kind] += 1
            if turn.kind in QUESTION_KINDS:
                assert readings[turn.user] == {turn.assistant}
                assert turn.weight == 16
            elif turn.kind == "ask":
                assert turn.user == ASK
                assert turn.assistant in readings
    assert set(kinds) == {*QUESTION_KINDS, "ask", "read"}
    assert min(kinds[kind] for kind in QUESTION_KINDS) > 150
