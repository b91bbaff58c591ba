"""Quotes: the document's sentences as answers to questions that quote them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from boxes import model, source

from amcli.errors import UsageError
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries import quotes
from amcli.pipeline.queries.passages import quote_passages
from amcli.pipeline.queries.reference import MAX_QUERIES, MAX_QUERIES_CPU, most_queries


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(model("pocket"), source(300))


def test_sentences_are_the_whole_document_in_order(context: Context) -> None:
    pieces = quotes.sentences(context)
    assert [i for piece in pieces for i in range(*piece)] == list(range(len(context.document)))
    lengths = [last - first for first, last in pieces]
    assert max(lengths) <= quotes.MOST
    assert min(lengths[:-1]) >= quotes.LEAST
    text = context.loaded.tokenizer.decode(context.document[slice(*pieces[0])])
    assert text.rstrip().endswith(".") or text.endswith("\n")


@pytest.mark.parametrize("mark", [".", "!", "\n"])
def test_sentences_end_at_their_marks_and_long_ones_are_cut(mark: str) -> None:
    said = prefill(
        model("pocket"), Source("x", ("one cat and another one " * 3 + mark) * 4 + "a b c d " * 80)
    )
    pieces = quotes.sentences(said)
    ends = [str(said.loaded.tokenizer.decode(said.document[:last])) for _, last in pieces]
    assert sum(text.endswith(mark) for text in ends) >= 3
    assert max(last - first for first, last in pieces) == quotes.MOST


def test_answers_are_the_documents_own_words(context: Context) -> None:
    text = context.loaded.tokenizer.decode(context.document)
    found = quotes.exchanges(context, 0)
    for exchange in found:
        assert exchange.answer in text
    forms = ("What does the text say", "Tell me more", "Which sentence", "What comes right before")
    assert {form for form in forms for x in found if x.question.startswith(form)} == {*forms}
    for exchange in found:
        if exchange.question.startswith(forms[2]):
            assert exchange.question.split('"')[1] in exchange.answer
        elif exchange.question.startswith(forms[3]):
            start = exchange.question.split('"')[1]
            assert exchange.answer in text[: text.index(start)]


def test_a_seed_gives_one_choice_of_about_as_many_tokens_as_the_document(context: Context) -> None:
    once, again, other = (quote_passages(context, seed) for seed in (0, 0, 1))
    assert [p.ids for p in once] == [p.ids for p in again]
    assert [p.ids for p in once] != [p.ids for p in other]
    assert 0.8 < sum(len(p.ids) for p in once) / len(context.document) < 1.3
    assert not any(p.asked for p in once)  # nothing is generated


def test_a_model_without_a_template_can_be_asked() -> None:
    raw = prefill(model("raw"), source(120))
    assert raw.loaded.chat.raw
    assert quote_passages(raw, 0)


def test_a_document_that_fills_the_positions_leaves_no_room(context: Context) -> None:
    geometry = replace(context.loaded.geometry, max_positions=context.T + 70)
    full = replace(context, loaded=replace(context.loaded, geometry=geometry))
    with pytest.raises(UsageError, match="leave no room to repeat a document of") as error:
        quote_passages(full, 0)
    assert error.value.code == "document-too-long"


def test_a_gpu_fits_more_queries_than_a_cpu() -> None:
    assert most_queries(torch.device("cpu")) == MAX_QUERIES_CPU < MAX_QUERIES
    assert most_queries(torch.device("cuda", 1)) == MAX_QUERIES
