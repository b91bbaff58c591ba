"""How an answer becomes a score in [0, 1]; each suite names one of these.

exact      1 when the greedy answer is the right one, word for word, and ends there
letter     1 when the right option's letter is the likeliest of the letters
substring  the share of the reference strings that the generated answer contains, ignoring case
           (as RULER does, arXiv 2404.06654)
reasoned   1 when the last option letter that stands alone in the generated answer is the right one
none       no score: only likelihoods count

`f1` and `contains` compare free answers word by word (as SQuAD does, arXiv 1606.05250).
"""

from __future__ import annotations

import re
import string
from collections import Counter

from amcli.evaluation.suites.base import Question, Scorer
from amcli.pipeline.contexts.forcing import Outcome

GENERATING: tuple[Scorer, ...] = ("substring", "reasoned")
"""Scorers that look at a generated answer."""


def score(scorer: Scorer, question: Question, outcome: Outcome, said: str | None) -> float | None:
    """The score of one answer; `said` is the generated text, for a scorer that needs one."""
    if scorer == "exact":
        return float(outcome.exact)
    if scorer == "letter":
        return float(question.options[outcome.choice or 0] == question.answer)
    if scorer == "substring":
        text = (said or "").lower()
        return sum(r.lower() in text for r in question.references) / len(question.references)
    if scorer == "reasoned":
        return float(chosen_letter(said or "", question.options) == question.answer)
    return None


def chosen_letter(said: str, options: tuple[str, ...]) -> str | None:
    """The letter that an answer settles on; None for one that names no letter or never ends.

    A thought between `<think>` tags does not count; one that is not closed never ended.
    """
    _, closed, rest = said.rpartition("</think>")
    if "<think>" in said and not closed:
        return None
    letters = re.findall(rf"(?<![A-Za-z])[{''.join(options)}](?![A-Za-z'’])", rest)
    if not letters:
        return None
    last_line = rest.strip().splitlines()[-1]
    final = re.findall(rf"(?<![A-Za-z])[{''.join(options)}](?![A-Za-z'’])", last_line)
    return str((final or letters)[-1])


_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’“”")


def words(text: str) -> list[str]:
    """The words of an answer, without case, punctuation and articles."""
    return [w for w in text.lower().translate(_PUNCTUATION).split() if w not in _ARTICLES]


def f1(said: str, right: str) -> float:
    """The harmonic mean of the shares of words that an answer and the right one have in common."""
    mine, theirs = words(said), words(right)
    if not mine or not theirs:
        return float(mine == theirs)
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs))


def contains(said: str, right: str) -> float:
    """1 if the words of the right answer appear consecutively in what was said."""
    mine, theirs = words(said), words(right)
    return float(f" {' '.join(theirs)} " in f" {' '.join(mine)} ")
