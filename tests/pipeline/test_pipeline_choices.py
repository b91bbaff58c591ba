"""Self-study, and mixtures of reference queries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from boxes import model, source

from amcli.errors import UsageError
from amcli.matching.sample import Queries
from amcli.models.replies import answers
from amcli.pipeline.compaction import compacting, fidelity
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context, live_keys, shared
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.queries import passages, reference
from amcli.pipeline.queries.passes import Passes
from amcli.pipeline.queries.reference import LayerReference
from amcli.pipeline.queries.self_study import Exchange, dialogues, question_count, study
from amcli.system.progress import Silent


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(model("pocket"), source(300))


@pytest.fixture(scope="module")
def exchanges(context: Context) -> list[Exchange]:
    return study(context, 24, seed=3)


def test_questions_are_about_the_document(context: Context, exchanges: list[Exchange]) -> None:
    assert 16 <= len(exchanges) <= 24
    assert len({e.question for e in exchanges}) == len(exchanges)
    text = source(300).text
    # Pocket answers from the document: nearly every answer has words that stand in it.
    grounded = [e for e in exchanges if any(word in text for word in e.answer.rstrip(".").split())]
    assert len(grounded) >= 0.9 * len(exchanges)
    assert sum(e.question.endswith("?") for e in exchanges) >= 0.9 * len(exchanges)


def test_a_seed_makes_the_questions(context: Context, exchanges: list[Exchange]) -> None:
    assert study(context, 24, seed=3) == exchanges
    assert study(context, 24, seed=4) != exchanges


def test_answers_are_what_the_context_gives(context: Context, exchanges: list[Exchange]) -> None:
    loaded = context.loaded
    asked = exchanges[5]
    alone = answers(loaded, shared(context), [loaded.chat.first_turn(asked.question)], [64])
    assert alone == [asked.answer]


def test_sampling_follows_temperature(context: Context) -> None:
    loaded, cache = context.loaded, shared(context)
    prompts = [loaded.chat.first_turn("Ask a question about the context.")] * 8
    greedy = answers(loaded, cache, prompts, [24] * 8)
    assert len(set(greedy)) == 1
    sampled = answers(loaded, cache, prompts, [24] * 8, temperature=1.0, seed=1)
    assert len(set(sampled)) > 4
    assert answers(loaded, cache, prompts, [24] * 8, temperature=1.0, seed=1) == sampled


def test_conversations_hold_every_exchange_once(
    context: Context, exchanges: list[Exchange]
) -> None:
    conversations = dialogues(context, exchanges, 200)
    assert len(conversations) > 1
    assert all(len(ids) <= 200 for ids, _ in conversations)
    assert sum(count for _, count in conversations) == len(exchanges)
    said = "".join(context.loaded.tokenizer.decode(ids) for ids, _ in conversations)
    for exchange in exchanges:
        assert exchange.question in said
    assert question_count(10) < question_count(1000) < question_count(10**6) < 2000


class Monotonous:
    """A model that always asks the same, whatever the seed."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(
        self, loaded: Any, cache: Any, prompts: Any, limits: Any, **more: Any
    ) -> list[str]:
        texts = [str(loaded.tokenizer.decode(ids)) for ids in prompts]
        self.asked += texts
        return ["Who is it?" if "begins with" not in text else text[:200] for text in texts]


def test_a_model_that_repeats_itself_is_pointed_to_parts(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = Monotonous()
    monkeypatch.setattr("amcli.pipeline.queries.self_study.answers", replies)
    found = study(context, 192)
    parts = [text for text in replies.asked if "begins with" in text]
    assert len(found) > 100
    assert len(set(parts)) > 100


def test_a_model_without_a_template_cannot_study() -> None:
    context = prefill(model("raw"), source(40))
    with pytest.raises(UsageError, match="no chat template"):
        compact(context, Request(ratio=2, queries="self-study"))
    assert compact(context, Request(tokens=1)).plan.queries.name == "repeat+quotes"


@pytest.mark.parametrize("queries", ["self-study", "repeat+self-study"])
def test_a_model_that_says_nothing_cannot_study(
    context: Context, monkeypatch: pytest.MonkeyPatch, queries: str
) -> None:
    monkeypatch.setattr(
        "amcli.pipeline.queries.self_study.answers",
        lambda loaded, cache, prompts, *_, **__: [""] * len(prompts),
    )
    with pytest.raises(UsageError, match="no answer to any question") as error:
        compact(context, Request(tokens=4, queries=queries))
    assert (error.value.code, error.value.field) == ("no-self-study", "queries")
    assert "queries='repeat+quotes'" in str(error.value.hint)


def test_parts_score_their_own_keys(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a part gives its keys is what a document of that part's keys alone would get."""
    monkeypatch.setattr(passages, "OWN_PART", 80)
    said = passages.SOURCES["repeat-parts"](context, 0, Silent())
    assert len(said) > 2
    found = reference.collect(context, said, progress=Silent())
    whole = [replace(passage, own=False) for passage in said]
    other = reference.collect(context, whole, progress=Silent())
    for layer in (0, len(found) - 1):
        own, all_ = found[layer].ranked("max"), other[layer].ranked("max")
        assert own.shape == all_.shape
        assert bool((own > 0).all())
        # Fewer keys share a query's attention, so that the best of each part gets no less of it.
        assert float(own.amax()) >= 0.99 * float(all_.amax())
        assert not torch.allclose(own, all_)
    first = said[0]
    alone = reference.collect(context, [first], progress=Silent())
    assert bool((alone[0].ranked("rms")[:, first.part.stop :] == 0).all())
    torch.testing.assert_close(
        alone[0].ranked("max")[:, first.part],
        found[0].ranked("max")[:, first.part],
        atol=1e-6,
        rtol=1e-4,
    )


def test_names_of_mixtures() -> None:
    assert passages.sources("repeat + self-study+repeat") == ("repeat", "self-study")
    with pytest.raises(UsageError, match="unknown reference queries 'self-studi'") as error:
        passages.sources("repeat+self-studi")
    assert "did you mean 'self-study'" in str(error.value.hint)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """A model that asks itself so many questions: enough to mix, and quick."""
    monkeypatch.setattr(passages, "question_count", lambda tokens: 16)
    return 16


@pytest.mark.usefixtures("few")
def test_a_mixture_ranks_by_both_and_fits_to_both(context: Context) -> None:
    def collected(name: str) -> dict[int, LayerReference]:
        said = passages.SOURCES[name](context, 0, Silent())
        return reference.collect(context, said, max_queries=96, progress=Silent())

    repeat, study = collected("repeat"), collected("self-study")
    for layer, found in reference.mixed([repeat, study], 64, 3).items():
        for kind, together in (
            ("rms", lambda a, b: ((a.square() + b.square()) / 2).sqrt()),
            ("mean", lambda a, b: (a + b) / 2),
            ("max", torch.maximum),
        ):
            a, b = (part[layer].scores.scores(kind) for part in (repeat, study))
            torch.testing.assert_close(found.ranked(kind), together(a, b))
        K, V = live_keys(context, layer)
        asked = found.sample.queries(K, V)
        for part, rows in ((repeat, slice(0, 48)), (study, slice(48, 64))):
            mine = part[layer].sample
            assert asked.Q.shape[1] == 64
            for h, row in enumerate(asked.Q[:, rows]):
                known = (mine.Q[h].unsqueeze(0) == row.unsqueeze(1)).all(-1)  # [32, n]
                assert known.any(1).all()
                at = known.int().argmax(1)
                assert torch.equal(asked.weights[h, rows], mine.weights[h, at])
        fresh = Queries.over(found.sample.Q, found.sample.W, K, V, found.sample.logits)
        torch.testing.assert_close(asked.lse, fresh.lse)
        torch.testing.assert_close(asked.Y, fresh.Y)


def test_methods_that_fit_in_their_own_way_see_every_source(context: Context) -> None:
    def kept(queries: str, name: str) -> torch.Tensor:
        options = Request(tokens=20, method=name, queries=queries, store="native")
        return compact(context, options, errors=False).layers[-1].keys.unpack()

    for name in ("am-omp", "am-highest-attention"):
        both = kept("context+repeat", name)
        assert not torch.equal(both, kept("repeat", name))
        assert not torch.equal(both, kept("context", name))


@pytest.mark.usefixtures("few")
def test_a_mixture_shares_its_passes_with_its_sources(context: Context) -> None:
    passes = Passes(context)
    options = Request(tokens=40, method="highest-attention", queries="repeat")
    alone = compact(context, options, passes=passes, errors=False)
    mixture = replace(options, queries="repeat+self-study")
    both = compact(context, mixture, passes=passes, errors=False)
    again = compact(context, options, passes=passes, errors=False)
    assert torch.equal(alone.layers[0].keys.codes, again.layers[0].keys.codes)
    fresh = compact(context, mixture, errors=False)
    assert torch.equal(both.layers[0].keys.codes, fresh.layers[0].keys.codes)
    assert both.seconds["reference"] > alone.seconds["reference"]


def test_the_model_is_asked_for_questions_only_where_they_are_wanted(
    context: Context, tmp_path: Path, few: int
) -> None:
    scarce = compact(context, Request(tokens=4, method="highest-attention"))
    assert "self-study" not in scarce.seconds
    assert scarce.asked == 0
    manifest = scarce.save(tmp_path / "a.amkv", overwrite=False)
    assert manifest["queries"]["source"] == "repeat+quotes"
    options = Request(tokens=4, method="highest-attention", queries="repeat+self-study")
    asked = compact(context, options)
    assert "self-study" in asked.seconds
    manifest = asked.save(tmp_path / "b.amkv", overwrite=False)
    assert manifest["queries"]["source"] == "repeat+self-study"
    assert manifest["queries"]["temperature"] == 1.0
    assert few // 2 < manifest["queries"]["asked"] <= few


def test_a_search_counts_each_pass_once(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Passes] = []

    def passes(*args: Any, **options: Any) -> Passes:
        kept.append(Passes(*args, **options))
        return kept[-1]

    monkeypatch.setattr(compacting, "Passes", passes)
    monkeypatch.setattr(fidelity, "ratios", lambda *args, **options: [4.0, 60.0])
    monkeypatch.setattr(passages, "question_count", lambda tokens: 8)
    options = Request(
        method="highest-attention", queries="repeat+self-study", store="native", max_queries=64,
        fidelity=0.01,
    )  # fmt: skip
    found = compact(context, options)
    done = kept[0].done  # (name, …) -> (what a pass gave, its seconds)
    once = sum(seconds for (name, *_), (_, seconds) in done.items() if name in passages.SOURCES)
    assert [name for name, *_ in done].count("repeat") == 1
    assert found.seconds["reference"] == pytest.approx(once)
