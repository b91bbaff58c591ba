"""Generated documents: the same from a seed on every machine, and true to their facts."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amcli.generator.documents import Document, blocks, characters, cut, generate

SEEDS = [f"test/{i}" for i in range(20)]


def stated(text: str, words: str) -> bool:
    """Whether the words stand in the text, as words; "the" may open a sentence."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def test_a_seed_gives_one_document() -> None:
    assert generate("a", 800) == generate("a", 800)
    assert len({generate(seed, 800).text for seed in SEEDS}) == len(SEEDS)


def test_the_text_of_a_seed_never_changes() -> None:
    # Trained weights, examples and every published number hang on it.
    assert generate("golden", 90).text == GOLDEN


@pytest.mark.parametrize("seed", SEEDS)
def test_every_fact_is_stated_where_it_is_recorded(seed: str) -> None:
    facts = 0
    for block in islice(blocks(Random(seed)), 120):
        for fact in block.facts:
            assert stated(block.text, fact.subject), (fact.subject, block.text)
            assert stated(block.text, fact.value), (fact.value, block.text)
            facts += 1
    assert facts > 100


@pytest.mark.parametrize("seed", SEEDS)
def test_headings_and_filler_say_nothing_that_could_be_asked(seed: str) -> None:
    document = generate(seed, 3000)
    subjects = {fact.subject for fact in document.facts}
    for block in islice(blocks(Random(seed)), 120):
        if not block.facts:
            assert not any(stated(block.text, subject) for subject in subjects), block.text


@pytest.mark.parametrize("seed", SEEDS)
def test_a_name_belongs_to_one_entity(seed: str) -> None:
    document = generate(seed, 4000)
    kinds = {(fact.subject, fact.kind.name) for fact in document.facts}
    assert max(Counter(subject for subject, _ in kinds).values()) == 1
    said = Counter((fact.subject, fact.attribute.name) for fact in document.facts)
    assert max(said.values()) == 1


def test_documents_have_every_kind_of_entity_and_layout() -> None:
    texts = [generate(seed, 4000) for seed in SEEDS]
    kinds = {fact.kind.name for document in texts for fact in document.facts}
    assert kinds == {"person", "service", "site", "team"}
    everything = "\n".join(document.text for document in texts)
    for mark in ("| --- |", "\n- ", "\n* ", "\n## ", " — ", "\n  "):
        assert mark in everything, mark


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(30, 3000))
def test_a_document_is_the_longest_that_fits(seed: int, length: int) -> None:
    document = cut(blocks(Random(seed)), length)
    used, parts = 0, []
    for block in islice(blocks(Random(seed)), 4000):
        size = characters([block.text])[0] + (1 if parts else 0)
        if parts and used + size > length:
            break
        used += size
        parts.append(block)
    assert used <= length
    want = tuple(fact for part in parts for fact in part.facts)
    title = parts[0].text.removeprefix("# ")
    assert document == Document(title, "\n\n".join(part.text for part in parts), want)


GOLDEN = """\
Bellwether Staff guide, November 2018

## How we are organised

The Juniper team uses cost centre K539. The cost centre of the Shotaell team is T915. The \
Summit team can be found in the Elder room. The Juniper team has its desks in the Spruce \
room. The Anchor team can be found in the Cherry room. The Shotaell team has its desks in \
the Ebony room."""
