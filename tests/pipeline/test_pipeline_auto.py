"""What the store `auto` decides for each layer, and that the bytes asked for are spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from boxes import model, source

from amcli.errors import UsageError
from amcli.matching.sample import Sample
from amcli.models.calling import run
from amcli.models.geometry import LayerGeometry
from amcli.pipeline.compaction import carrying, choices, compacting, fidelity
from amcli.pipeline.compaction.budget_file import BudgetFile
from amcli.pipeline.compaction.choices import Rounding, coarse_changes, worst_rounding
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.plan import Plan, Target, decide
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context, full_layers, shared
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.queries import passages, reference
from amcli.storage.artifacts import Artifact, NewArtifact
from amcli.system.progress import SILENT

FAST = Request(method="highest-attention", queries="repeat", max_queries=256)
LAYER = LayerGeometry("full", 2, 64, 64)


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(model("pocket"), source(400))


def target(*layers: LayerGeometry, T: int = 1000, itemsize: int = 4) -> Target:
    full = {i: x for i, x in enumerate(layers) if x.window is None}
    sliding = {i: x for i, x in enumerate(layers) if x.window is not None}
    return Target("it", T, full, itemsize, sliding)


def plan(it: Target, changes: Mapping[int, float], **asked: Any) -> Plan:
    return decide(it, replace(FAST, **asked), lambda: changes)


def refuse() -> dict[int, float]:
    raise AssertionError("measured")


# ---- by what rounding changes ----------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"ratio": 20.0}, {"tokens": 1000}, {"tokens": 10}])
def test_a_layer_that_four_bits_would_spoil_gets_eight(asked: dict[str, Any]) -> None:
    """And so does one of which nothing is known. A size in tokens says nothing of bytes."""
    changes = {0: 0.1, 1: 0.2501, 2: math.nan, 3: math.inf, 4: 0.25}
    found = plan(target(*[LAYER] * 6), changes, **asked)
    assert found.stores == dict(zip(range(6), ["k4v4", *["k8v8"] * 3, "k4v4", "k8v8"], strict=True))
    assert plan(target(*[LAYER] * 3), {}, **asked).store == "k8v8"
    assert plan(target(*[LAYER] * 3), dict.fromkeys(range(3), 0.0), **asked).store == "k4v4"


def test_dimensions_that_do_not_fit_four_bits_get_eight() -> None:
    odd = [LayerGeometry("full", 2, 65, 64), LayerGeometry("full", 2, 64, 7), LAYER]
    found = plan(target(*odd), dict.fromkeys(range(3), 0.0), ratio=20.0)
    assert list(found.stores.values()) == ["k8v8", "k8v8", "k4v4"]
    assert decide(target(*odd[:2]), replace(FAST, ratio=20.0), refuse).store == "k8v8"


def test_what_is_measured_is_the_rounding_of_the_whole_layer() -> None:
    context = prefill(model("qwen3"), source(60))
    held = reference.collect(context, passages.repeat_passages(context), kinds=(), progress=SILENT)
    plain = coarse_changes(context, held)
    assert list(plain) == list(full_layers(context))
    assert all(0 < x < choices.ROUNDING for x in plain.values())
    # Sharp attention in one layer: small errors of its logits change its outputs.
    x = held[1].sample
    held[1] = replace(held[1], sample=Sample(x.Q * 60, x.W, x.logits))
    sharp = coarse_changes(context, held)
    assert sharp[1] > choices.ROUNDING
    assert {**sharp, 1: 0} == {**plain, 1: 0}
    assert coarse_changes(context, {}) == {}
    found = worst_rounding(context, held, dict.fromkeys(held, "k4v4"))
    assert found == Rounding(1, "k4v4", sharp[1])
    fine = worst_rounding(context, held, {1: "k8v8", 2: "native"})
    assert fine is not None
    assert (fine.layer, fine.store) == (1, "k8v8")
    assert fine.error < sharp[1] / 4
    assert worst_rounding(context, held, {1: "native"}) is None


def test_without_held_out_queries_eight_bits_are_safe(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrying, "held_out", lambda *_: {})
    assert compact(context, replace(FAST, ratio=20), errors=False).plan.store == "k8v8"


def test_numbers_that_no_code_holds_are_said_with_their_layer() -> None:
    context = prefill(model("pocket"), source(100))
    layer = full_layers(context)[2]
    keys, values = context.cache.live(layer)
    context.cache.set_live(layer, keys[0] * 1e7, values[0], context.T)
    with pytest.raises(UsageError, match=f"layer {layer}: NaN, infinity or a key"):
        compact(context, replace(FAST, ratio=10), errors=False)


def test_a_document_in_four_bits(context: Context) -> None:
    found = compact(context, replace(FAST, ratio=20))
    assert found.plan.store == "k4v4"
    assert 20 <= found.ratio < 20.1
    native = compact(context, replace(FAST, ratio=20, store="native"))
    entries = [sum(sum(h.lengths) for h in c.layers) for c in (found, native)]
    assert entries[0] > 2.5 * entries[1]
    assert compact(context, Request(ratio=20, method="knorm")).plan.store == "native"


# ---- the bytes asked for are spent -----------------------------------------------------------


def test_where_eight_bits_hold_every_key_nothing_is_measured() -> None:
    it = target(*[LAYER] * 4)
    found = decide(it, replace(FAST, ratio=3.5), refuse)
    assert (found.store, {x.entries for x in found.layers}) == ("k8v8", {1000})
    assert decide(it, Request(method="keep", store="auto"), refuse).store == "k8v8"


@pytest.mark.parametrize(
    "more", [{}, {"positions": True}, {"method": "omp"}, {"budget": "pyramid"}], ids=str
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_left_over_goes_to_the_layers_that_lose_most(
    itemsize: int, more: dict[str, Any]
) -> None:
    it, order = target(*[LAYER] * 6, itemsize=itemsize), [4, 1, 5, 0, 3, 2]
    changes = {i: (6 - n) / 100 for n, i in enumerate(order)}
    counts = set()
    for step in range(100, 400):
        ratio = step * itemsize / 200
        found = plan(it, changes, ratio=ratio, **more)
        fine = [i for i, store in found.stores.items() if store == "k8v8"]
        if {x.entries for x in found.layers} != {1000}:
            assert fine == []
            continue
        assert sorted(fine) == sorted(order[: len(fine)])
        assert found.full_bytes / found.stored_bytes >= ratio
        if len(fine) < 6:  # one more would be too many
            finer = {**found.stores, order[len(fine)]: "k8v8"}
            stored = sum(
                x.stored_bytes([1000] * 2, found.method.has_beta)
                for x in it.shapes(finer, bool(more.get("positions")))
            )
            assert found.full_bytes / stored < ratio
        counts.add(len(fine))
    assert counts == set(range(7))


def test_a_large_layer_that_has_no_room_leaves_it_to_smaller_ones() -> None:
    it = target(LayerGeometry("full", 16, 64, 64), LAYER, LAYER)
    found = plan(it, {0: 0.2, 1: 0.1, 2: 0.05}, ratio=6)
    assert list(found.stores.values()) == ["k4v4", "k8v8", "k8v8"]


def test_layers_that_need_eight_bits_have_them_before_any_key_is_kept() -> None:
    it = target(*[LAYER] * 4)
    found = plan(it, {0: 0.3, 1: 0.3, 2: 0.3, 3: 0.1}, ratio=6)
    assert list(found.stores.values()) == ["k8v8", "k8v8", "k8v8", "k4v4"]
    assert all(x.entries < 1000 for x in found.layers)


@pytest.mark.parametrize("method", ["highest-attention", "omp"])
def test_less_is_lost_the_smaller_the_ratio(context: Context, method: str) -> None:
    passes = compacting.Passes(context)
    worst = []
    for ratio in (7.0, 6.0, 5.0, 4.0, 3.5):
        if method == "omp" and ratio == 7.0:
            continue  # biases leave no room for every key
        found = compact(context, replace(FAST, method=method, ratio=ratio), passes=passes)
        assert found.ratio >= ratio
        assert all(set(heads.lengths) == {context.T} for heads in found.layers)
        assert found.errors is not None
        worst.append(max(map(max, found.errors.output)))
        named = compact(context, replace(FAST, method=method, ratio=ratio, store="k4v4"))
        assert named.errors is not None
        assert worst[-1] <= max(map(max, named.errors.output)) * (1 + 1e-4)
    assert worst == sorted(worst, reverse=True)
    assert worst[-1] < worst[0] / 10


def test_a_budget_file_has_room_for_every_key_too(context: Context, tmp_path: Path) -> None:
    compact(context, replace(FAST, ratio=30)).save_budget(tmp_path / "b.json", overwrite=False)
    file = BudgetFile.read(tmp_path / "b.json")
    found = compact(context, replace(FAST, ratio=5, budget=file), errors=False)
    assert found.plan.store == "mixed"
    assert found.ratio >= 5
    assert all(set(heads.lengths) == {context.T} for heads in found.layers)
    assert {x.entries for x in found.plan.layers} == {context.T}


def test_a_search_measures_once_and_finds_what_the_ratio_gives(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(context: Context, held: Any) -> dict[int, float]:
        measured.append(1)
        return {**coarse_changes(context, held), 3: 0.9}

    monkeypatch.setattr(carrying, "coarse_changes", measure)
    tried: list[Compaction] = []

    def carried_out(*args: Any, **options: Any) -> Compaction:
        tried.append(carrying.carry_out(*args, **options))
        return tried[-1]

    monkeypatch.setattr(fidelity, "carry_out", carried_out)
    found = compact(context, replace(FAST, fidelity=0.9))
    assert len(measured) == 1
    assert len(tried) > 2
    assert all(x.plan.stores[3] == "k8v8" for x in tried)
    assert found.plan.size["ratio"] > 1
    again = compact(context, replace(FAST, ratio=found.plan.size["ratio"]), errors=False)
    assert again.plan.stores == found.plan.stores
    assert [x.lengths for x in again.layers] == [x.lengths for x in found.layers]
    # Where four bits are not enough, eight are tried.
    monkeypatch.setattr(fidelity, "ratios", lambda *_: [2.0])
    monkeypatch.setattr(fidelity.Judge, "fidelity", lambda *_: 1.0)
    assert compact(context, replace(FAST, fidelity=1.0)).plan.store == "k8v8"


# ---- sliding windows -------------------------------------------------------------------------


def next_logits(context: Context, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor([context.ids[5:17]])
        network: Any = context.loaded.model
        return run(network, cache, ids).logits


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
def test_windows_are_eight_bits_under_auto_and_change_no_more(name: str, tmp_path: Path) -> None:
    context = prefill(model(name), source(60))
    sliding = set(range(len(context.loaded.geometry.layers))) - set(full_layers(context))
    assert sliding

    def changed(store: str) -> float:
        """By rounding the windows and nothing else, relative to the spread of the logits."""
        stores = dict.fromkeys(sliding, store)
        whole = compact(context, Request(method="keep", store=stores), errors=False)
        full = next_logits(context, context.cache.fork())
        off = next_logits(context, shared(context, whole.layers)) - full
        return float(off.norm() / (full - full.mean(-1, keepdim=True)).norm())

    assert 0 < changed("k8v8") < 0.01
    assert changed("k8v8") < changed("k4v4") / 10

    request = replace(FAST, ratio=3)
    with NewArtifact(tmp_path / "doc.amkv") as new:
        found = compact(context, request, errors=False, into=new)
        manifest = found.finish(new)
    assert {manifest["stores"][i] for i in sliding} == {"k8v8"}
    assert {found.layers[i].store for i in sliding} == {"k8v8"}
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        loaded = restore(artifact, context.loaded)
    # What is measured is what is stored.
    told = next_logits(context, loaded.cache), next_logits(context, shared(context, found.layers))
    assert torch.equal(*told)
    found.apply()
    assert torch.equal(next_logits(context, context.cache), told[0])


def test_windows_stay_as_they_are_where_a_store_is_named() -> None:
    context = prefill(model("gemma3_text"), source(60))
    for request in (
        replace(FAST, ratio=3, store="k4v4"),
        replace(FAST, ratio=3, store="native"),
        Request(ratio=3, method="knorm"),
    ):
        found = compact(context, request, errors=False)
        sliding = set(range(len(found.layers))) - set(full_layers(context))
        assert {found.layers[i].store for i in sliding} == {"native"}
        assert found.plan.sliding == {}


@pytest.mark.parametrize("store", ["auto", "native"])
@pytest.mark.parametrize("name", ["pocket", "gemma3_text"])
def test_the_ratio_in_all_is_that_of_all_bytes(name: str, store: str, tmp_path: Path) -> None:
    context = prefill(model(name), source(60))
    found = compact(context, replace(FAST, ratio=3, store=store, budget="uniform"), errors=False)
    found.save(tmp_path / "doc.amkv", overwrite=False)
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        full, stored = artifact.full_bytes, artifact.payload_bytes
    assert found.whole_ratio == pytest.approx(full / stored)
    assert found.plan.whole_ratio == pytest.approx(found.whole_ratio, rel=0.05)
    assert (name == "pocket") == (found.whole_ratio == found.ratio)
