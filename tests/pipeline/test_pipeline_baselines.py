"""Baselines through the whole pipeline: real ratios, any model, and the context's own queries."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from boxes import model, source

from amcli.errors import UsageError
from amcli.matching import methods
from amcli.matching.baselines.last_queries import LastQueries
from amcli.matching.catalogue import RIVALS
from amcli.models import rotary
from amcli.models.cache import CompactCache
from amcli.models.generate import absorb
from amcli.models.layer import CompactLayer
from amcli.models.rotary import Rotary
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context, full_layers, live_keys
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.queries import passes as passing
from amcli.pipeline.queries import reference
from amcli.pipeline.queries.passages import context_passages, repeat_passages
from amcli.pipeline.queries.passes import Passes
from amcli.pipeline.queries.reference import collect
from amcli.pipeline.talk.session import Session
from amcli.storage.artifacts import Artifact
from amcli.system.progress import Silent

BASELINES = [*RIVALS]
FEW = {"max_queries": 256}


@cache
def context(name: str) -> Context:
    """A document of about 250 tokens."""
    return prefill(model(name), source(260, seed=3))


@cache
def passes(name: str) -> Passes:
    return Passes(context(name))


def own_queries(of: Context) -> dict[int, torch.Tensor]:
    """Each full layer's queries `[Hq, T, d]` when the whole context is read in one go."""
    found: dict[int, torch.Tensor] = {}

    def look(index: int, query: torch.Tensor, layer: CompactLayer, *rest: object) -> None:
        found[index] = query[0]

    whole = CompactCache.empty(of.loaded.geometry)
    with whole.observe(look):
        absorb(of.loaded.model, whole, of.ids, of.T)
    return {i: found[i] for i in full_layers(of)}


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_makes_a_file_of_the_ratio_that_was_asked_for(
    name: str, tmp_path: Path
) -> None:
    found = compact(
        context("pocket"), Request(method=name, ratio=8, **FEW), passes=passes("pocket")
    )
    found.save(tmp_path / "doc.amkv", overwrite=False)
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        assert 8 <= artifact.ratio < 8.4
        assert artifact.manifest["method"] == {"name": name}
        queries = artifact.manifest["queries"]
        want = methods.get(name).source if methods.get(name).queries else "none"
        assert queries["source"] == want
        assert (queries["count"] > 0) == (want != "none")
        stored = restore(artifact, context("pocket").loaded)
    assert list(Session(stored, max_tokens=4).ask("Who lives here?"))
    again = compact(context("pocket"), Request(method=name, ratio=8, **FEW))
    for a, b in zip(found.layers, again.layers, strict=True):
        assert a.lengths == b.lengths
        assert torch.equal(a.keys.unpack(), b.keys.unpack())
        assert torch.equal(a.values.unpack(), b.values.unpack())
        assert (a.beta is None) == (not name.startswith("am-"))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("name", BASELINES)
def test_grouped_heads_and_sliding_layers(family: str, name: str) -> None:
    of = context(family)
    found = compact(of, Request(method=name, ratio=6, **FEW), passes=passes(family))
    assert found.ratio >= 6
    for i, heads in enumerate(found.layers):
        assert bool(heads.keys.unpack().isfinite().all())
        if i not in full_layers(of):
            assert set(heads.lengths) == {of.loaded.geometry.layers[i].window - 1}
    found = compact(of, Request(method=name, tokens=2, **FEW), passes=passes(family))
    assert sum(t for i in full_layers(of) for t in found.layers[i].lengths) == 2 * 2 * len(
        full_layers(of)
    )


@pytest.mark.parametrize("budget", ["adakv", "adaptive", "global", "pyramid", "uniform"])
@pytest.mark.parametrize("name", ["snapkv", "expected-attention", "am-highest-attention"])
def test_any_method_takes_any_budget(name: str, budget: str) -> None:
    found = compact(context("llama"), Request(method=name, ratio=9, budget=budget, **FEW))
    assert found.ratio >= 9
    assert found.plan.budget == budget
    per_layer = [sum(heads.lengths) for heads in found.layers]
    if budget in ("adakv", "uniform"):
        assert max(per_layer) - min(per_layer) <= 2
    if budget == "uniform":
        assert max(map(max, (heads.lengths for heads in found.layers))) <= min(per_layer) // 2 + 1
    else:
        assert len({t for heads in found.layers for t in heads.lengths}) > 2
    if budget == "pyramid":
        assert per_layer[0] > per_layer[1] > 10 * per_layer[2]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_window_of_queries_is_that_of_the_whole_prefill(family: str) -> None:
    """Also where a sliding layer has forgotten what the last tokens saw."""
    of = context(family)
    size = of.cache.nbytes()
    found = collect(of, context_passages(of, 9), watch=LastQueries, kinds=(), progress=Silent())
    for i, query in own_queries(of).items():
        watched = found[i].watched
        assert isinstance(watched, LastQueries)
        assert watched.Q is not None
        H = of.loaded.geometry.layers[i].kv_heads
        want = query[:, -9:].reshape(H, -1, 9, query.shape[-1])
        torch.testing.assert_close(watched.Q, want, atol=1e-4, rtol=1e-4)
    assert (of.cache.get_seq_length(), of.cache.nbytes()) == (of.T, size)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_context_queries_score_only_what_they_could_see(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CHUNK", 100)
    of = context(family)
    found = collect(of, context_passages(of), max_queries=10**6, progress=Silent())
    for i, query in own_queries(of).items():
        K = live_keys(of, i)[0]
        H, T, d = K.shape
        S = query.reshape(H, -1, T, d) @ K.unsqueeze(1).mT * found[i].sample.logits.scale
        P = S.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf).softmax(-1)
        torch.testing.assert_close(
            found[i].scores.scores("max"), P.amax((1, 2)), atol=1e-3, rtol=1e-3
        )
        torch.testing.assert_close(
            found[i].scores.scores("mean"), P.mean((1, 2)), atol=1e-4, rtol=1e-3
        )
        assert found[i].sample.Q.shape == (H, query.shape[0] // H * T, d)
        assert bool((found[i].sample.weights == 1).all())


def test_own_methods_run_on_the_contexts_queries(tmp_path: Path) -> None:
    found = compact(context("pocket"), Request(ratio=8, queries="context", **FEW))
    found.save(tmp_path / "doc.amkv", overwrite=False)
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        queries = artifact.manifest["queries"]
        assert (queries["source"], queries["count"]) == ("context", 256)
    other = compact(context("pocket"), Request(ratio=8, **FEW))
    assert any(a.lengths != b.lengths for a, b in zip(found.layers, other.layers, strict=True))


def test_parts_of_a_repetition_cover_the_context_once() -> None:
    of = context("pocket")
    passages = repeat_passages(of, part=100)
    assert len(passages) > 2
    places = [j for p in passages for j in range(p.part.start, p.part.stop)]
    assert places == list(range(of.T))
    for p in passages:
        inside = slice(max(p.part.start, of.document_start), min(p.part.stop, of.document_end))
        assert of.ids[inside] == p.ids[p.first :]


def test_a_larger_window_keeps_more_of_the_end() -> None:
    def recent(window: int | None, **size: float) -> int:
        options = Request(method="snapkv", window=window, **size)  # type: ignore[arg-type]
        heads = compact(context("llama"), options).layers[0]
        return len(set(map(tuple, heads.keys.unpack().tolist())) & last)

    last = set(map(tuple, live_keys(context("llama"), 0)[0][:, -40:].flatten(0, 1).tolist()))
    assert recent(30, tokens=40) >= 2 * 30 > recent(2, tokens=40) + 20
    assert recent(None, tokens=40) >= 2 * 10


def test_streaming_moves_what_it_keeps_together() -> None:
    """A key that is closer than it was looks as if it had been written there."""
    of = context("qwen3")
    turn = Rotary(of.loaded.model, of.loaded.geometry)
    heads = compact(of, Request(method="streaming", tokens=20)).layers[1]
    K = live_keys(of, 1)[0]
    keys = heads.keys.unpack().view(2, 20, -1)
    assert torch.equal(keys[:, 4:], K[:, -16:])
    sinks = turn.unrotate(1, K[:, :4], torch.arange(4))
    want = turn.rotate(1, sinks, torch.arange(of.T - 20, of.T - 16))
    torch.testing.assert_close(keys[:, :4], want)
    assert not torch.allclose(keys[:, :4], K[:, :4])


def test_reference_passes_are_run_once_for_all_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = passing.collect

    def counted(*args: object, **options: object) -> object:
        calls.append(options["watch"])
        return run(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(passing, "collect", counted)
    of = context("llama")
    shared = Passes(of)
    for name in ("kvzip", "kvzip-uniform", "snapkv", "pyramidkv", "omp"):
        for ratio in (4.0, 12.0):
            options = Request(method=name, ratio=ratio, **FEW)
            one, two = compact(of, options, passes=shared), compact(of, options)
            assert one.seconds["reference"] > 0
            for a, b in zip(one.layers, two.layers, strict=True):
                assert a.lengths == b.lengths
                assert torch.equal(a.keys.unpack(), b.keys.unpack())
    # Passes of their own, two for omp, and shared ones: a repetition, a window, omp's two samples.
    assert len(calls) == 8 + 4 + 4
    with pytest.raises(ValueError, match="another context"):
        compact(context("qwen3"), Request(method="kvzip"), passes=shared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Request(method="snapkv", queries="repeat"), "defined by its own queries"),
        (Request(method="kvzip", queries="context"), "defined by its own queries"),
        (Request(method="snapkv", window=0), "below 1"),
        (Request(method="snapkv", budget="fair"), "unknown budget 'fair'"),
    ],
)
def test_options_that_make_no_sense(options: Request, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compact(context("llama"), options)


@pytest.mark.parametrize("name", ["expected-attention", "streaming"])
@pytest.mark.parametrize("missing", ["module", "function", "truth"])
def test_a_model_whose_rope_is_not_found_is_refused(
    name: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = context("llama")
    if missing == "module":
        monkeypatch.delattr(of.loaded.model.get_decoder(), "rotary_emb")  # type: ignore[operator]
    elif missing == "function":
        monkeypatch.setattr(rotary, "apply_function", lambda model: None)
    else:  # one that turns the other way
        found = rotary.apply_function(of.loaded.model)
        assert found is not None
        monkeypatch.setattr(
            rotary, "apply_function", lambda model: lambda q, k, c, s: found(q, k, c, -s)
        )
    with pytest.raises(UsageError, match="rotary position embedding of LlamaForCausalLM"):
        compact(of, Request(method=name, ratio=4))
    assert compact(of, Request(method="knorm", ratio=4), errors=False).ratio >= 4


def test_expected_attention_looks_at_the_positions_to_come() -> None:
    """The rotation it is given is the mean over the next 512 positions, by the model itself."""
    of = context("qwen3")
    seen: list[methods.ScoreContext] = []
    name = "expected-attention-seen"
    own = methods.get("expected-attention")

    def look(ctx: methods.ScoreContext) -> torch.Tensor:
        seen.append(ctx)
        assert own.score is not None
        return own.score(ctx)

    methods.register(replace(own, name=name, score=look))
    try:
        compact(of, Request(method=name, ratio=4, budget="adakv"))
    finally:
        methods.unregister(name)
    turn = Rotary(of.loaded.model, of.loaded.geometry)
    q = torch.randn(8, generator=torch.Generator().manual_seed(0))
    want = turn.rotate(0, q.expand(512, -1), torch.arange(of.T, of.T + 512)).mean(0)
    assert seen[0].rotation is not None
    torch.testing.assert_close(seen[0].rotation @ q, want, atol=1e-5, rtol=1e-4)
    assert seen[0].budget == "adakv"
    assert [ctx.layer for ctx in seen] == [0, 1, 2]
