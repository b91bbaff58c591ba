"""Held-out text: where it comes from, that nothing is fitted to it, and the errors on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from boxes import model, source

from amcli.matching import methods
from amcli.pipeline.compaction import heldout
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context, live_keys
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.queries.passages import repeat_passages
from amcli.system.progress import Silent

REQUEST = Request(ratio=15, method="omp", queries="repeat", max_queries=512)


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(model("pocket"), source(400))


@pytest.fixture(scope="module")
def compacted(context: Context) -> Compaction:
    return compact(context, REQUEST)


def test_parts_begin_where_no_reference_passage_does(context: Context) -> None:
    document = context.ids[context.document_start : context.document_end]
    fitted = {tuple(p.ids[p.first :][: heldout.QUOTED]) for p in repeat_passages(context)}
    parts = heldout.parts(context, 64, 100, seed=0)
    said = [p.ids[p.first - heldout.QUOTED :] for p in parts]
    assert len(parts) >= 4
    for piece in said:
        assert tuple(piece[: heldout.QUOTED]) not in fitted
        assert any(document[i : i + len(piece)] == piece for i in range(len(document)))
    assert sum(map(len, said)) > 0.8 * len(document)
    assert heldout.parts(context, 64, 100, seed=1) != parts
    assert heldout.parts(context, 64, 100, seed=0) == parts
    assert len(heldout.parts(context, 64, 2, seed=0)) == 2


@pytest.mark.parametrize("length", [1, 30, 60, 100])
def test_a_document_of_any_length_has_a_part(length: int) -> None:
    context = prefill(model("pocket"), source(200))
    context = replace(context, document_end=context.document_start + length)
    for seed in range(5):
        parts = heldout.parts(context, 128, 32, seed)
        assert parts
        assert all(len(p.ids) > p.first for p in parts)


def test_no_part_where_the_positions_end() -> None:
    context = prefill(model("pocket"), source(200))
    limit = int(context.loaded.geometry.max_positions or 0)
    longer = replace(context, ids=context.ids + [5] * (limit - context.T - 20))
    assert heldout.parts(longer, 64, 8, seed=0) == []
    assert heldout.queries(longer, 0, Silent()) == {}


def test_errors_are_those_of_softmax_attention_in_float64(
    compacted: Compaction, context: Context
) -> None:
    held = heldout.queries(context, 0, Silent())
    assert compacted.errors is not None
    assert compacted.errors.count == heldout.QUERIES == held[0].sample.Q.shape[1]
    for layer in (0, 5, 8):
        K, V = (x.double() for x in live_keys(context, layer))
        found = held[layer].sample
        for h, (keys, values, beta) in enumerate(compacted.layers[layer].unpack().heads()):
            assert beta is not None
            Q, W = found.Q[h].double(), found.weights[h].double()
            full = Q @ K[h].T * found.logits.scale
            kept = Q @ keys.double().T * found.logits.scale + beta.double()
            ratio = (kept.logsumexp(1) - full.logsumexp(1)).exp()
            mass = ((W * (ratio - 1)).square().sum() / W.square().sum()).sqrt()
            Y, mine = full.softmax(1) @ V[h], kept.softmax(1) @ values.double()
            output = ((W * (mine - Y).square().sum(1)).sum() / (W * Y.square().sum(1)).sum()).sqrt()
            assert compacted.errors.mass[layer][h] == pytest.approx(float(mass), rel=1e-3)
            assert compacted.errors.output[layer][h] == pytest.approx(float(output), rel=1e-3)
            assert compacted.errors.attention[layer][h] == pytest.approx(float(W.mean()), rel=1e-3)


def test_measuring_changes_no_entry(compacted: Compaction, context: Context) -> None:
    plain = compact(context, REQUEST, errors=False)
    assert plain.errors is None
    assert "errors" not in plain.seconds
    for a, b in zip(plain.layers, compacted.layers, strict=True):
        assert a.lengths == b.lengths
        assert torch.equal(a.values.unpack(), b.values.unpack())


def test_errors_of_all_methods_compare(context: Context) -> None:
    """Methods that look at no queries, or keep only what they need of them, have errors too."""
    means = {}
    for name in ("keep", "random", "kvzip", "omp"):
        ratio = None if methods.get(name).selection == "all" else 8.0
        found = compact(context, Request(method=name, ratio=ratio, queries=None, max_queries=512))
        assert found.errors is not None
        assert found.errors.count == heldout.QUERIES
        outputs = torch.tensor(found.errors.output)
        means[name] = float(outputs.mean())
    assert means["keep"] < 1e-4
    assert means["omp"] < min(means["kvzip"], means["random"])


def test_sliding_layers_have_no_errors_and_full_ones_have() -> None:
    context = prefill(model("gemma3_text"), source(60))
    found = compact(context, Request(ratio=4, max_queries=256, queries="repeat"))
    assert found.errors is not None
    for layer, errors in zip(context.loaded.geometry.layers, found.errors.output, strict=True):
        assert len(errors) == (0 if layer.type == "sliding" else layer.kv_heads)


def test_an_empty_head_misses_everything(context: Context) -> None:
    found = compact(context, Request(tokens=1, budget="global", method="random"))
    empty = [(i, h) for i, x in enumerate(found.layers) for h, t in enumerate(x.lengths) if t == 0]
    assert found.errors is not None
    for layer, head in empty:
        assert found.errors.mass[layer][head] == pytest.approx(1)
        assert found.errors.output[layer][head] == pytest.approx(1)
