"""Free answers against right ones, as SQuAD compares them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amcli.evaluation.scorers import contains, f1, words

SAID = st.text(st.sampled_from("aAbcthe .,'’\n0é"), max_size=24)


def test_case_punctuation_and_articles_do_not_count() -> None:
    assert words("The  Fox, an “old” one;\nthe A-Team's!") == ["fox", "old", "one", "ateams"]
    # An article is a word of its own, not a part of one.
    assert words("Theatre and ant") == ["theatre", "and", "ant"]
    assert f1("The cat.", "a CAT") == 1.0


@pytest.mark.parametrize(
    ("said", "right", "known"),
    [
        ("red fox", "red fox", 1.0),
        ("fox red", "red fox", 1.0),
        ("a red fox sleeps here", "red fox", 2 * 0.5 * 1 / 1.5),
        ("fox fox fox", "fox", 0.5),  # a word counts as often as both have it
        ("blue", "red fox", 0.0),
        ("", "red fox", 0.0),
        ("red fox", "", 0.0),
        ("", "", 1.0),
        ("the", "", 1.0),  # nothing but articles says nothing
    ],
)
def test_f1_against_values_by_hand(said: str, right: str, known: float) -> None:
    assert f1(said, right) == pytest.approx(known)


@pytest.mark.parametrize(
    ("said", "right", "known"),
    [
        ("It is the Red Fox, I think.", "red fox", 1.0),
        ("fox red", "red fox", 0.0),
        ("red old fox", "red fox", 0.0),
        ("a redfox", "red", 0.0),  # whole words only
        ("12 foxes", "2 foxes", 0.0),
        ("", "red fox", 0.0),
        ("", "", 1.0),
    ],
)
def test_contains_against_values_by_hand(said: str, right: str, known: float) -> None:
    assert contains(said, right) == known


@given(SAID, SAID)
def test_f1_is_a_symmetric_share(a: str, b: str) -> None:
    assert 0.0 <= f1(a, b) <= 1.0
    assert f1(a, b) == f1(b, a)
    assert (f1(a, b) == 1.0) == (Counter(words(a)) == Counter(words(b)))


@given(SAID, SAID, SAID)
def test_an_answer_contains_itself_wherever_it_stands(before: str, said: str, after: str) -> None:
    assert contains(said, said) == 1.0
    if words(said):  # no words are contained in no words only
        assert contains(f"{before} {said} {after}", said) == 1.0
