"""`needle`: one fact in long filler, at ten depths from the first sentence to the last.

After the needle-in-a-haystack test, worded as in RULER (arXiv 2404.06654). A document has one
needle, so there are ten documents for each one asked for; the kind is the depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from amcli.evaluation.suites import filler
from amcli.evaluation.suites.base import Document, Question, Suite, Wanted

DEPTHS = 10


def documents(wanted: Wanted) -> Iterator[Document]:
    """`wanted.docs` documents at each of ten depths."""
    for index in range(wanted.docs):
        for step in range(DEPTHS):
            depth = step / (DEPTHS - 1)
            rng = Random(f"eval/needle/{wanted.seed}/{wanted.tokens}/{index}/{step}")
            [key], [value] = filler.keys(rng, 1), filler.numbers(rng, 1)
            fact = f"The special magic number for {key} is {value}."
            text = filler.hide(rng, wanted.measure, wanted.tokens, [fact], [depth])
            question = Question(
                f"What is the special magic number for {key}? Answer with the number only.",
                value,
                f"depth {depth:.0%}",
                references=(value,),
            )
            yield Document(f"needle {index} at {depth:.0%}", text, (question,))


NEEDLE = Suite("needle", "substring", documents, docs=1)
