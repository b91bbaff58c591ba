"""One layer from keys and queries to stored entries, and the registry of methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_heads import Heads, heads

from amcli.errors import UsageError
from amcli.matching.catalogue import DEFAULT
from amcli.matching.layers import compact_layer, compact_layers
from amcli.matching.methods import (
    LayerInput,
    LayerResult,
    Method,
    ScoreContext,
    get,
    names,
    register,
    unregister,
)
from amcli.matching.sample import Sample
from amcli.matching.scores import ScoreState
from amcli.matching.tiles import Logits, Room


def scores_of(h: Heads) -> torch.Tensor:
    state = ScoreState(h.K.shape[0], h.K.shape[1])
    state.update(h.Q, h.K, h.logits, weights=h.W)
    return state.scores("max")


def input_of(h: Heads, lengths: list[int], sample: Sample | None = None) -> LayerInput:
    return LayerInput(sample or h.sample, h.K, h.V, scores_of(h), lengths)


def run(
    h: Heads, method: Method | str, lengths: list[int], sample: Sample | None = None, **options: Any
) -> LayerResult:
    method = get(method) if isinstance(method, str) else method
    return compact_layer(method, input_of(h, lengths, sample), **options)


def keeping(h: Heads, nested: bool = False) -> Sample:
    """A sample that keeps what is found."""
    return Sample(h.Q, h.W, h.logits, kept=True, nested=nested)


def errors(h: Heads, result: LayerResult, Q: torch.Tensor) -> tuple[list[float], list[float]]:
    """Relative mass and output errors of each head on queries `Q`, in float64, unweighted."""
    mass, output = [], []
    for i, (keys, values, beta) in enumerate(result.heads.heads()):
        q = Q[i].double()
        full = torch.exp(q @ h.K[i].double().T * h.scale)
        bias = 0.0 if beta is None else beta.double()
        kept = torch.exp(q @ keys.double().T * h.scale + bias)
        Y = full @ h.V[i].double() / full.sum(1, keepdim=True)
        out = kept @ values.double() / kept.sum(1, keepdim=True).clamp_min(1e-300)
        mass.append(float((kept.sum(1) / full.sum(1) - 1).square().mean().sqrt()))
        output.append(float((out - Y).norm() / Y.norm()))
    return mass, output


@pytest.mark.parametrize("name", ["omp", "omp-no-bias", "highest-attention"])
def test_reported_errors_are_those_of_the_stored_entries(name: str) -> None:
    h = heads(H=4, T=120, n=150, dtype=torch.bfloat16)
    h = replace(h, W=torch.ones_like(h.W))
    result = run(h, name, [60, 5, 17, 16])
    assert result.heads.keys.unpack().dtype == result.heads.values.unpack().dtype == torch.bfloat16
    mass, output = errors(h, result, h.Q)
    assert result.mass_error.tolist() == pytest.approx(mass, rel=1e-2, abs=1e-4)
    assert result.output_error.tolist() == pytest.approx(output, rel=1e-2, abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 7, 20, 39, 40]), min_size=3, max_size=3),
    name=st.sampled_from(["omp", "omp-no-bias", "highest-attention"]),
    fit_limit=st.sampled_from([4, 8192]),
    room=st.sampled_from([1, 1 << 30]),
    seed=st.integers(0, 9),
)
def test_every_mixture_of_lengths_is_stored_exactly(
    lengths: list[int], name: str, fit_limit: int, room: int, seed: int
) -> None:
    h = heads(H=3, T=40, n=60, seed=seed)
    result = run(h, name, lengths, fit_limit=fit_limit, room=Room(1 << 22, room))
    assert result.heads.lengths == tuple(lengths)
    assert result.index.dtype == torch.int32
    assert bool(result.heads.values.unpack().isfinite().all())
    start = 0
    for i, (keys, values, beta) in enumerate(result.heads.heads()):
        index = result.index[start : start + lengths[i]].long()
        start += lengths[i]
        assert (beta is not None) == get(name).has_beta
        assert bool((index.diff() > 0).all())  # by position, no key twice
        assert torch.equal(keys, h.K[i, index])
        if lengths[i] == 40:
            assert torch.equal(values, h.V[i])
            assert beta is None or bool((beta == 0).all())
            assert result.mass_error[i] == result.output_error[i] == 0
        if lengths[i] == 0:
            assert result.mass_error[i] == result.output_error[i] == 1


def test_keep_is_bit_exact_and_needs_no_queries() -> None:
    h = heads(T=30, n=0 + 4, dtype=torch.bfloat16)
    none = Sample(h.Q[:, :0], None, Logits(1.0))
    result = compact_layer(get("keep"), LayerInput(none, h.K, h.V, torch.zeros(2, 30), [30, 30]))
    assert result.heads.beta is None
    assert torch.equal(result.heads.keys.unpack(), h.K.reshape(60, -1))
    assert torch.equal(result.heads.values.unpack(), h.V.reshape(60, -1))
    assert result.index.tolist() == [*range(30), *range(30)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("regime", ["diffuse", "mixed", "sharp"])
def test_pieces_earn_their_place_on_queries_they_did_not_see(regime: str, seed: int) -> None:
    h = heads(regime, H=4, T=400, n=500, d=32, dv=32, seed=seed)
    lengths = [25] * 4

    def unseen(method: Method | str) -> tuple[float, float]:
        mass, output = errors(h, run(h, method, lengths), h.Q_new)
        return sum(mass) / 4, sum(output) / 4

    biased, best = unseen("omp"), unseen("omp-no-bias")
    attention = unseen("highest-attention")
    evict = unseen(replace(get("omp"), selection="top", mass="none", values="original"))
    assert biased[0] < best[0]  # what biases are for; what they do to outputs differs by head
    assert biased[1] < best[1] * 1.1
    assert best[0] < attention[0] * 1.02
    assert best[1] < attention[1] * 1.02
    assert attention[1] < evict[1]
    if regime == "diffuse":
        assert best[1] < 0.85 * attention[1]
        g = torch.Generator().manual_seed(seed)
        at_random = replace(input_of(h, lengths), scores=torch.rand(4, 400, generator=g))
        blind = compact_layer(get("highest-attention"), at_random)
        assert best[1] < 0.9 * sum(errors(h, blind, h.Q_new)[1]) / 4


def test_a_longer_budget_is_a_better_one() -> None:
    h = heads("diffuse", T=300, n=400)
    curve = [run(h, "omp", [t, t]).output_error.mean().item() for t in (5, 15, 45, 135)]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 0.3 * curve[0]


def test_bucketing_does_not_change_a_head() -> None:
    h = heads(H=3, T=120, n=100)
    apart = run(h, "omp", [24, 3, 23], room=Room(1 << 22, 1))
    alone = run(h, "omp", [24, 0, 0], room=Room(1 << 22, 1))
    assert torch.equal(apart.index[:24], alone.index)
    torch.testing.assert_close(
        apart.heads.values.unpack()[:24], alone.heads.values.unpack(), atol=1e-4, rtol=1e-4
    )


def test_fits_work_around_entries_beyond_the_limit() -> None:
    h = heads("diffuse", T=100, n=200)
    limited, free = (run(h, "omp", [50, 50], fit_limit=k) for k in (20, 8192))
    none = run(h, replace(get("omp"), mass="none", values="original"), [50, 50])
    assert torch.equal(limited.index, free.index)
    assert bool((limited.mass_error < none.mass_error).all())
    assert bool((limited.output_error < none.output_error).all())
    mass, _ = errors(replace(h, W=torch.ones_like(h.W)), limited, h.Q)
    assert mass == pytest.approx(limited.mass_error.tolist(), rel=0.3)
    assert limited.heads.beta is not None
    assert int((limited.heads.beta == 0).sum()) == 60


def test_same_seed_same_bits() -> None:
    h = heads(T=90, n=100)
    a, b = run(h, "omp", [20, 9], seed=4), run(h, "omp", [20, 9], seed=4)
    assert torch.equal(a.heads.values.unpack(), b.heads.values.unpack())
    assert a.heads.beta is not None
    assert b.heads.beta is not None
    assert torch.equal(a.heads.beta, b.heads.beta)
    assert torch.equal(a.index, b.index)


def test_tiles_do_not_change_the_result() -> None:
    h = heads(T=90, n=100)
    a, b = run(h, "omp", [20, 9]), run(h, "omp", [20, 9], room=Room(700, 1 << 30))
    assert torch.equal(a.index, b.index)
    torch.testing.assert_close(
        a.heads.values.unpack(), b.heads.values.unpack(), atol=2e-3, rtol=2e-3
    )


def test_softcap_and_value_dims_other_than_key_dims() -> None:
    h = heads(T=100, n=150, d=16, dv=6)
    capped = Sample(h.Q, h.W, Logits(h.scale, 2.0))
    result = run(h, "omp", [30, 30], capped)
    assert result.heads.values.unpack().shape == (60, 6)
    assert float(result.output_error.max()) < 0.6
    exact = run(h, "omp", [99, 99], capped)
    assert float(exact.mass_error.max()) < 0.02


def test_mismatched_inputs_are_refused() -> None:
    h = heads(T=40, n=20)
    good = replace(input_of(h, [4, 4]), sample=Sample(h.Q, None, Logits(1.0)))
    omp = get("omp")

    def refused(words: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=words):
            compact_layer(omp, replace(good, **changed))

    refused("values", V=h.V[:, :39])
    refused("queries", sample=Sample(h.Q[..., :3], None, Logits(1.0)))
    refused("reference queries", sample=Sample(h.Q[:, :0], None, Logits(1.0)))
    refused("scores", scores=torch.rand(2, 39))
    refused("lengths", lengths=[4, 41])
    with pytest.raises(ValueError, match="weights"):
        Sample(h.Q, h.W[:, :3], Logits(1.0))
    with pytest.raises(ValueError, match="every key"):
        compact_layer(get("keep"), good)


@pytest.fixture
def knorm() -> Iterator[Method]:
    def score(ctx: ScoreContext) -> torch.Tensor:
        norm: torch.Tensor = ctx.K.float().norm(dim=-1)
        return -norm

    yield register(
        Method(
            name="knorm-for-a-test", score=score, queries=False,
            selection="top", mass="none", values="original",
        )
    )  # fmt: skip
    unregister("knorm-for-a-test")


def test_a_method_of_one_declaration_runs_without_queries(knorm: Method) -> None:
    h = heads(T=50, n=10)
    assert knorm.score is not None
    none = Sample(h.Q[:, :0], None, h.logits)
    context = ScoreContext(none, h.K, h.V)
    assert (context.Q, context.weights) == (None, None)
    layer = LayerInput(none, h.K, h.V, knorm.score(context), [6, 2])
    result = compact_layer(get("knorm-for-a-test"), layer)
    smallest = h.K[0].norm(dim=-1).argsort()[:6].sort().values
    assert result.index[:6].tolist() == smallest.tolist()
    assert torch.equal(result.heads.values.unpack()[:6], h.V[0, smallest])
    assert result.heads.beta is None
    assert bool(result.output_error.isnan().all())


def test_registry_knows_the_built_in_methods_and_names_the_nearest() -> None:
    assert DEFAULT == names()[0] == "omp"
    assert {"omp", "highest-attention", "keep"} <= set(names())
    with pytest.raises(UsageError, match="'higest-attention'") as caught:
        get("higest-attention")
    assert "did you mean 'highest-attention'?" in str(caught.value.hint)
    assert "keep" in str(caught.value.hint)
    with pytest.raises(UsageError) as caught:
        get("zzz")
    assert "did you mean" not in str(caught.value.hint)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        register(get("omp"))


@pytest.mark.parametrize("name", ["omp", "omp-no-bias", "highest-attention", "am-omp"])
def test_what_is_kept_between_calls_changes_no_result(name: str) -> None:
    h = heads(T=90, n=80)
    sample = keeping(h)
    method = get(name)
    compact = method.fit or partial(compact_layer, method)
    for lengths in ([30, 12], [9, 4], [90, 5]):
        alone = compact(input_of(h, lengths))
        after = compact(input_of(h, lengths, sample))
        assert torch.equal(alone.index, after.index)
        torch.testing.assert_close(alone.heads.values.unpack(), after.heads.values.unpack())
        torch.testing.assert_close(alone.output_error, after.output_error)


def test_a_search_over_ratios_selects_once() -> None:
    h = heads(T=200, n=150)
    sample = keeping(h, nested=True)
    longer = run(h, "omp", [40, 30], sample)
    shorter = run(h, "omp", [11, 30], sample)
    assert set(shorter.index[:11].tolist()) < set(longer.index[:40].tolist())
    assert torch.equal(shorter.index[11:], longer.index[40:])
    # As good as a selection of its own: the order was chosen among more candidates.
    alone = run(h, "omp", [11, 30])
    assert bool((shorter.output_error <= 1.1 * alone.output_error + 0.01).all())
    assert run(h, "omp", [45, 30], sample).heads.lengths == (45, 30)


@pytest.mark.parametrize("room", [1, 1 << 20, 1 << 30])
@pytest.mark.parametrize("kept", [False, True])
def test_layers_together_are_what_they_are_alone(room: int, kept: bool) -> None:
    """Also layers of other dimensions, other numbers of heads, and heads with nothing to do."""
    some = [heads(H=3, T=80, n=60, seed=1), heads(H=2, T=80, n=60, seed=2)]
    some.append(heads(H=2, T=80, n=60, d=16, seed=3))
    lengths = [[30, 0, 7], [8, 80], [31, 12]]
    own = Room(1 << 22, room)

    def layers() -> list[LayerInput]:
        return [
            input_of(h, t, Sample(h.Q, h.W, h.logits, kept=kept))
            for h, t in zip(some, lengths, strict=True)
        ]

    alone = [compact_layer(get("omp"), layer, room=own) for layer in layers()]
    counted: list[int] = []
    together = dict(compact_layers(get("omp"), layers(), room=own, advance=counted.append))
    assert sum(counted) == 7
    for i, theirs in enumerate(alone):
        mine = together[i]
        assert mine.heads.lengths == theirs.heads.lengths
        assert torch.equal(mine.index, theirs.index)
        torch.testing.assert_close(
            mine.heads.values.unpack(), theirs.heads.values.unpack(), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(mine.output_error, theirs.output_error, rtol=1e-3, atol=1e-5)
