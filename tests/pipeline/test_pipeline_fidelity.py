"""The search for a ratio: what it measures, that it is held out, and what cannot be measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from boxes import RAW, model, source

from amcli.errors import UsageError
from amcli.pipeline.compaction import carrying, fidelity
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.defaults import AUTO_FIDELITY
from amcli.pipeline.compaction.fidelity import Judge, beginning, held_out, ratios
from amcli.pipeline.compaction.plan import Target, decide
from amcli.pipeline.compaction.request import Request, check
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.forcing import Forced, Teacher
from amcli.pipeline.contexts.reading import emptied, prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries import quotes
from amcli.system.progress import SILENT

FAST = Request(method="highest-attention", queries="repeat", max_queries=256)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "QUOTES", 12)


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(model("pocket"), source(400))


@pytest.fixture(scope="module")
def small(context: Context) -> Compaction:
    return compact(context, replace(FAST, ratio=30.0))


@torch.no_grad()
def plain(model: Any, before: list[int], asked: list[Forced]) -> torch.Tensor:
    """`[tokens, V]`: log-probabilities of all targets, by the model's own forward pass."""
    found = []
    for q in asked:
        ids = torch.tensor([before + q.prompt + q.targets])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        first = len(before) + len(q.prompt) - 1
        found.append(logits[first : first + len(q.targets)].double().log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["pocket", RAW, "gemma3_text"])
def test_what_is_lost_without_the_document_is_what_the_plain_model_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "LEAST", 0.0)  # random models take little notice of a document
    context = prefill(model(name), source(150), system="Be brief." if name == "pocket" else None)
    asked = held_out(context, 3)
    judge = Judge(context, asked, SILENT)
    full = plain(context.loaded.model, context.ids, asked)
    none = plain(context.loaded.model, emptied(context).ids, asked)
    assert judge.tokens == len(full)
    assert judge.none == pytest.approx(float((full.exp() * (full - none)).sum()), rel=1e-3)


@pytest.mark.parametrize("name", ["pocket", RAW, "llama", "gemma3_text"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_an_emptied_context_is_that_of_an_empty_document(name: str, system: str | None) -> None:
    empty = emptied(prefill(model(name), source(60), system=system))
    other = prefill(model(name), Source("nothing", ""), system=system)
    assert empty.ids == other.ids
    assert empty.document == []
    assert empty.cache.get_seq_length() == len(other.ids)


def test_all_is_kept_by_every_key_and_less_by_fewer(context: Context, small: Compaction) -> None:
    judge = Judge(context, held_out(context, 0), SILENT)
    keep = compact(context, Request(method="keep"), errors=False)
    assert judge.fidelity(keep.layers) == 1
    less = compact(context, replace(FAST, ratio=100.0), errors=False)
    assert 0 <= judge.fidelity(less.layers) < judge.fidelity(small.layers) < 1


@pytest.mark.parametrize(("batch", "kept"), [(2048, 0), (1, 2**31), (100, 40 * 4096 * 4)])
def test_what_is_kept_and_what_is_computed_again_are_the_same(
    context: Context, small: Compaction, batch: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = held_out(context, 0)
    usual = Judge(context, asked, SILENT)
    monkeypatch.setattr(fidelity, "BATCH", batch)
    monkeypatch.setattr(fidelity, "KEPT", kept)
    found = Judge(context, asked, SILENT)
    assert found.none == pytest.approx(usual.none, rel=1e-4)
    assert found.fidelity(small.layers) == pytest.approx(usual.fidelity(small.layers), abs=1e-4)


def test_numbers_that_are_none_keep_nothing(context: Context, small: Compaction) -> None:
    judge = Judge(context, held_out(context, 0), SILENT)
    layers = [replace(x, beta=torch.full((sum(x.lengths),), torch.nan)) for x in small.layers]
    assert judge.fidelity(layers) == 0


def test_no_fit_has_seen_the_quotes(context: Context) -> None:
    """Those of a fit with the same seed are others, whatever the seed."""
    for seed in (0, 7919, 2**63 - 1):
        fitted = {x.question for x in quotes.exchanges(context, seed)}
        prompts = [context.lead(question) for question in fitted]
        assert all(x.prompt not in prompts for x in held_out(context, seed))
    assert held_out(context, 1) == held_out(context, 1)
    assert held_out(context, 1) != held_out(context, 2)


def test_short_documents_are_asked_more_than_once_and_long_ones_for_a_part(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "QUOTES", 100)
    every = held_out(context, 0)
    assert len(every) > 2 * len(quotes.exchanges(context, 7919))
    assert len({tuple(x.prompt) for x in every}) == len(every)
    monkeypatch.setattr(fidelity, "QUOTES", 3)
    assert held_out(context, 0) == every[:3] != every


def test_a_ratio_may_be_auto(context: Context) -> None:
    found = compact(context, replace(FAST, ratio="auto"))
    same = compact(context, replace(FAST, fidelity=AUTO_FIDELITY))
    assert found.fidelity is not None
    assert found.fidelity == same.fidelity
    assert found.fidelity.asked == AUTO_FIDELITY <= found.fidelity.agreement
    assert found.errors == same.errors is not None
    assert 2 <= len(found.fidelity.probes) <= 6
    at = replace(FAST, ratio=found.requested["ratio"])
    again = compact(context, at, errors=False)
    assert [x.lengths for x in again.layers] == [x.lengths for x in found.layers]
    assert found.requested == {"ratio": at.ratio, "fidelity": AUTO_FIDELITY}


def test_one_reference_pass_and_at_most_six_compactions(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Compaction] = []

    def carried_out(*args: Any, **more: Any) -> Compaction:
        done.append(carrying.carry_out(*args, **more))
        return done[-1]

    monkeypatch.setattr(fidelity, "carry_out", carried_out)
    whole: list[bool] = []

    class Counting(Teacher):
        def _pieces(self, cache: Any, batch: Any) -> Any:
            whole.append(cache is self.reference)
            return super()._pieces(cache, batch)

    monkeypatch.setattr(fidelity, "Teacher", Counting)
    for share in (0.5, 0.9, 0.99):
        done.clear()
        whole.clear()
        compact(context, replace(FAST, fidelity=share), errors=False)
        assert len(done) <= 6
        assert whole.count(True) == 1
        assert whole.count(False) == len(done) + 1  # and no context


# ---- what cannot be measured, or makes no sense ----------------------------------------------


@pytest.mark.parametrize(
    ("asked", "code", "field"),
    [
        ({"ratio": "most"}, "ratio-no-number", "ratio"),
        ({"ratio": "20"}, "ratio-no-number", "ratio"),
        ({"ratio": "auto", "tokens": 5}, "sizes-exclude", "ratio"),
        ({"ratio": "auto", "fidelity": 0.9}, "sizes-exclude", "fidelity"),
        ({"ratio": 20.0, "fidelity": 0.9}, "sizes-exclude", "fidelity"),
        ({"tokens": 5, "fidelity": 0.9}, "sizes-exclude", "fidelity"),
        ({"ratio": "auto", "method": "keep"}, "method-keeps-all", "ratio"),
        ({"fidelity": 0.9, "method": "keep"}, "nothing-to-search", "fidelity"),
        ({"fidelity": 0.0}, "fidelity-no-share", "fidelity"),
        ({"fidelity": 1.01}, "fidelity-no-share", "fidelity"),
        ({"fidelity": float("nan")}, "fidelity-no-share", "fidelity"),
    ],
)
def test_what_makes_no_sense(asked: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(Request(**asked), 100)
    assert (caught.value.code, caught.value.field) == (code, field)


def test_a_size_that_is_not_found_yet_is_no_plan(context: Context) -> None:
    with pytest.raises(ValueError, match="has yet to be found"):
        decide(Target.of(context), Request(ratio="auto"), dict)


@pytest.mark.parametrize("ratio", ["auto", None])
def test_a_document_that_cannot_be_quoted(ratio: str | None) -> None:
    asked = replace(FAST, ratio=ratio, fidelity=None if ratio else 0.9)
    for text in ("", " \n ", "One."):
        context = prefill(model("pocket"), Source("doc.txt", text))
        with pytest.raises(UsageError, match="no quotes of it are left") as caught:
            compact(context, asked)
        assert caught.value.code == "nothing-to-quote"


def test_positions_that_end_too_soon(context: Context) -> None:
    asked = held_out(context, 0)
    lengths = sorted(x.length for x in asked)

    def limited(room: int) -> Context:
        geometry = replace(context.loaded.geometry, max_positions=context.T + room)
        return replace(context, loaded=replace(context.loaded, geometry=geometry))

    shorter = held_out(limited(lengths[-1] - 1), 0)
    assert shorter == [x for x in asked if x.length < lengths[-1]]
    with pytest.raises(UsageError, match="leave no room to measure a fidelity") as caught:
        held_out(limited(lengths[0] - 1), 0)
    assert caught.value.code == "no-room-to-measure"


def test_a_document_that_makes_no_difference(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "emptied", lambda context: context)
    with pytest.raises(UsageError, match="nothing to lose") as caught:
        compact(context, replace(FAST, ratio="auto"))
    assert caught.value.code == "nothing-to-lose"


def outcome(context: Context, request: Request) -> Compaction | UsageError:
    try:
        return compact(context, request)
    except UsageError as error:
        return error


@pytest.mark.parametrize("words", [2, 12, 30])
def test_short_documents_have_an_answer_too(words: int) -> None:
    """A file, or an error in one line; never a complaint about a ratio that nobody gave."""
    text = " ".join(source(100).text.split()[:words])
    context = prefill(model("pocket"), Source("doc.txt", text))
    for asked in (replace(FAST, ratio="auto"), Request(ratio="auto", store="native")):
        found = outcome(context, asked)
        if isinstance(found, Compaction):
            assert found.fidelity is not None
            assert found.fidelity.agreement >= AUTO_FIDELITY
        else:
            assert found.field == "fidelity"
        first = beginning(asked, context.T)
        assert 1 in ratios(decide(Target.of(context), first, dict))
