"""`ruler`: the task families of RULER (arXiv 2404.06654) that a generator can make.

Multi-key, multi-value and multi-query needles (4 needles each, as there), variable tracking
(one chain, 4 hops) and common-word extraction (10 common words). Scored as there: the share of the
right strings that a generated answer contains. The filler and the wording are ours: any chat model
can answer every task without an example to copy the form from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random

from amcli.errors import UsageError
from amcli.evaluation.suites import filler
from amcli.evaluation.suites.base import Document, Measure, Question, Suite, Wanted

NEEDLES = 4
HOPS = 4
COMMON = 10
FULL_LIST = 4096
"""From this many tokens on, common words occur 30 times and others 3; below, 10 times and once."""

_MAGIC = "One of the special magic numbers for {key} is {value}."
_ONLY = "Answer with the number{s} only{sep}."


def _depths(rng: Random, count: int) -> list[float]:
    return [rng.random() for _ in range(count)]


def _needles(rng: Random, measure: Measure, tokens: int, pairs: list[tuple[str, str]]) -> str:
    facts = [_MAGIC.format(key=key, value=value) for key, value in pairs]
    return filler.hide(rng, measure, tokens, facts, _depths(rng, len(facts)))


def multi_key(rng: Random, measure: Measure, tokens: int) -> tuple[str, Question]:
    """Four keys, one number each; one key is asked for."""
    pairs = list(zip(filler.keys(rng, NEEDLES), filler.numbers(rng, NEEDLES), strict=True))
    text = _needles(rng, measure, tokens, pairs)
    key, value = rng.choice(pairs)
    asked = f"What is the special magic number for {key}? {_ONLY.format(s='', sep='')}"
    return text, Question(asked, value, "multi-key", (value,), max_tokens=128)


def multi_value(rng: Random, measure: Measure, tokens: int) -> tuple[str, Question]:
    """One key with four numbers; all of them are asked for."""
    [key], values = filler.keys(rng, 1), filler.numbers(rng, NEEDLES)
    text = _needles(rng, measure, tokens, [(key, value) for value in values])
    values.sort(key=text.index)
    asked = (
        f"What are all the special magic numbers for {key}? "
        f"{_ONLY.format(s='s', sep=', separated by commas')}"
    )
    answer = ", ".join(values)
    return text, Question(asked, answer, "multi-value", tuple(values), max_tokens=128)


def multi_query(rng: Random, measure: Measure, tokens: int) -> tuple[str, Question]:
    """Four keys, one number each; all of them are asked for."""
    keys, values = filler.keys(rng, NEEDLES), filler.numbers(rng, NEEDLES)
    text = _needles(rng, measure, tokens, list(zip(keys, values, strict=True)))
    asked = (
        f"What are the special magic numbers for {', '.join(keys[:-1])}, and {keys[-1]}? "
        f"{_ONLY.format(s='s', sep=', in this order, separated by commas')}"
    )
    answer = ", ".join(values)
    return text, Question(asked, answer, "multi-query", tuple(values), max_tokens=128)


def variable_tracking(rng: Random, measure: Measure, tokens: int) -> tuple[str, Question]:
    """A chain `VAR A = 12345`, `VAR B = VAR A`, …: all variables of that value are asked for."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choice(letters) for _ in range(5))] = None
    chain = list(names)
    [value] = filler.numbers(rng, 1, digits=5)
    facts = [f"VAR {chain[0]} = {value}."]
    facts += [f"VAR {b} = VAR {a}." for a, b in pairwise(chain)]
    text = filler.hide(rng, measure, tokens, facts, sorted(_depths(rng, len(facts))))
    asked = (
        f"The text assigns values to variables. Which variables have the value {value}, directly "
        "or through other variables? Answer with the names of the variables only, separated by "
        "commas."
    )
    return text, Question(asked, ", ".join(chain), "variable-tracking", tuple(chain), max_tokens=64)


def common_words(rng: Random, measure: Measure, tokens: int) -> tuple[str, Question]:
    """A numbered list in which ten words are ten times as frequent as the others."""
    often, seldom = (30, 3) if tokens >= FULL_LIST else (10, 1)
    common, others = filler.words(rng, COMMON, tokens // (2 * seldom))
    seed = rng.random()

    def listing(count: int) -> str:
        entries = common * often + others[:count] * seldom
        Random(seed).shuffle(entries)
        return "\n".join(f"{i}. {word}" for i, word in enumerate(entries, 1))

    low, high = 0, len(others)  # the most of the other words that still fit
    while low < high:
        middle = (low + high + 1) // 2
        if measure.one(listing(middle)) <= tokens:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise UsageError(
            f"a list of words does not fit into {tokens} tokens",
            "use tokens=1024",
            code="words-too-many",
            field="tokens",
            tokens=tokens,
        )
    asked = (
        f"What are the {COMMON} words that stand most often in the list above? "
        "Answer with these words only, separated by commas."
    )
    answer = ", ".join(common)
    return listing(low), Question(asked, answer, "common-words", tuple(common), max_tokens=120)


Task = Callable[[Random, Measure, int], tuple[str, Question]]

TASKS: tuple[Task, ...] = (multi_key, multi_value, multi_query, variable_tracking, common_words)


def documents(wanted: Wanted) -> Iterator[Document]:
    """`wanted.docs` documents of each task family, one question each."""
    for index in range(wanted.docs):
        for task in TASKS:
            rng = Random(f"eval/ruler/{wanted.seed}/{wanted.tokens}/{index}/{task.__name__}")
            text, question = task(rng, wanted.measure, wanted.tokens)
            yield Document(f"{question.kind} {index}", text, (question,))


RULER = Suite("ruler", "substring", documents, docs=2)
