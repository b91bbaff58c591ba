"""The paper's Attention Matching against its algorithms written out head by head, and budgets."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from math import exp

import pytest
import torch
from dense_heads import context, layer
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_heads import Heads, heads

from amcli.matching import budgets
from amcli.matching.baselines import am_omp
from amcli.matching.baselines.least_squares import fit_layer
from amcli.matching.budgets import LayerShape
from amcli.matching.methods import LayerFit, LayerInput, LayerResult, get, names

SHAPE = LayerShape(heads=2, tokens=100, key_dim=8, value_dim=8, itemsize=2)


def run(h: Heads, fit: LayerFit, lengths: list[int], scores: torch.Tensor) -> LayerResult:
    return fit(LayerInput(h.sample, h.K, h.V, scores, lengths))


def entries(result: LayerResult) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Positions, beta and values of each head."""
    places = torch.split(result.index.long(), list(result.heads.lengths))
    return [
        (place.tolist(), beta, values)
        for place, (_, values, beta) in zip(places, result.heads.heads(), strict=True)
        if beta is not None
    ]


def features(h: Heads, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    S = h.Q[i].double() @ h.K[i].double().T * h.scale
    Phi = torch.exp(S - S.max(1, keepdim=True).values)
    return Phi, Phi.sum(1)


def pursuit(
    Phi: torch.Tensor, m: torch.Tensor, t: int, step: int
) -> tuple[list[int], torch.Tensor, int]:
    """The paper's algorithm 1 with its dropping, one head, by general least squares."""
    chosen: list[int] = []
    gone: set[int] = set()
    refills = 0
    w = torch.zeros(0, dtype=Phi.dtype)
    while True:
        while len(chosen) < t:
            r = m - Phi[:, chosen] @ w
            order = sorted(range(Phi.shape[1]), key=lambda j: -float(r @ Phi[:, j]))
            free = [j for j in order if j not in gone and j not in chosen]
            chosen += free[: min(step, t - len(chosen))]
            w = torch.linalg.lstsq(Phi[:, chosen], m).solution.clamp(1e-12, exp(7))
        low = [j for j, x in zip(chosen, w, strict=True) if x < exp(-7)]
        if not low or refills == 3:
            return chosen, w, refills
        refills += 1
        gone |= set(low)
        chosen = [j for j in chosen if j not in low]
        w = torch.linalg.lstsq(Phi[:, chosen], m).solution.clamp(1e-12, exp(7))


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(("regime", "seed"), [("diffuse", 0), ("mixed", 1), ("sharp", 2)])
def test_am_omp_takes_the_papers_keys_and_weights(regime: str, seed: int, step: int) -> None:
    h = heads(regime, H=3, T=60, n=90, seed=seed, dtype=torch.float64)
    fit = partial(fit_layer, partial(am_omp.weigh, keys_a_solve=step))
    result = run(h, fit, [14, 14, 9], torch.zeros(3, 60))
    for i, (place, beta, _) in enumerate(entries(result)):
        Phi, m = features(h, i)
        chosen, w, _ = pursuit(Phi, m, len(place), step)
        assert place == sorted(chosen)
        want = dict(zip(chosen, w.log().tolist(), strict=True))
        assert beta.tolist() == pytest.approx([want[j] for j in place], abs=1e-3)


def test_keys_of_no_weight_are_replaced_three_times_and_never_come_back() -> None:
    """Near-duplicates get negative weights, so that every round has something to drop."""
    g = torch.Generator().manual_seed(4)
    base = torch.rand(40, 12, dtype=torch.float64, generator=g)
    Phi = torch.cat([base + 0.05 * torch.rand(40, 12, generator=g) for _ in range(4)], dim=1)
    m = Phi.sum(1)
    chosen, w, refills = pursuit(Phi, m, 16, 2)
    assert refills == 3
    index, weight = am_omp.Pursuit(Phi.T.unsqueeze(0), m.unsqueeze(0), 16).run(2)
    assert sorted(index[0].tolist()) == sorted(chosen)
    want = dict(zip(chosen, w.tolist(), strict=True))
    assert weight[0].tolist() == pytest.approx([want[j] for j in index[0].tolist()], rel=1e-3)
    assert len(set(index[0].tolist())) == 16


def test_pursuit_that_runs_out_of_keys_takes_dropped_ones_back() -> None:
    g = torch.Generator().manual_seed(1)
    Phi = torch.rand(30, 10, dtype=torch.float64, generator=g)
    twice = torch.cat([Phi, Phi + 1e-4 * torch.rand(30, 10, generator=g)], dim=1)
    index, _ = am_omp.Pursuit(twice.T.unsqueeze(0), twice.sum(1).unsqueeze(0), 19).run(4)
    assert len(set(index[0].tolist())) == 19


def test_am_omp_in_little_memory_uses_fewer_queries_and_one_head_at_a_time() -> None:
    h = heads(H=3, T=40, n=100)
    every_third = Heads(h.K, h.V, h.Q[:, [0, 33, 66, 99]], h.Q_new, h.W[:, :4], h.scale)
    zeros = torch.zeros(3, 40)
    small = partial(fit_layer, partial(am_omp.weigh, phi_elements=4 * 40))
    place = [p for p, _, _ in entries(run(h, small, [3] * 3, zeros))]
    want = partial(fit_layer, am_omp.weigh)
    assert place == [p for p, _, _ in entries(run(every_third, want, [3] * 3, zeros))]


def test_am_highest_attention_takes_the_papers_keys_and_weights() -> None:
    h = heads("sharp", H=3, T=60, n=90)
    method = get("am-highest-attention")
    assert method.score is not None
    assert method.fit is not None
    x = context(layer(), sample=h.sample, K=h.K, V=h.V)
    scores = method.score(x)
    result = run(h, method.fit, [20, 20, 6], scores)
    at_bound = 0
    for i, (place, beta, _) in enumerate(entries(result)):
        P = (h.Q[i].double() @ h.K[i].double().T * h.scale).softmax(1)
        rms = P.square().mean(0).sqrt()
        torch.testing.assert_close(scores[i].double(), rms, rtol=1e-4, atol=1e-7)
        assert place == sorted(rms.topk(len(place)).indices.tolist())
        Phi, m = features(h, i)
        A = Phi[:, place]
        w = torch.linalg.lstsq(A, m).solution.clamp(exp(-3), exp(3))
        for _ in range(2):
            step = 1 / torch.linalg.svdvals(A)[0] ** 2
            w = (w - step * A.T @ (A @ w - m)).clamp(exp(-3), exp(3))
        assert beta.tolist() == pytest.approx(w.log().tolist(), abs=1e-3)
        at_bound += int((w.log().abs() > 2.999).sum())
    assert at_bound  # the bounds had something to do


@pytest.mark.parametrize("name", ["am-omp", "am-highest-attention"])
def test_values_are_plain_least_squares_and_errors_those_of_the_entries(name: str) -> None:
    h = heads("diffuse", H=3, T=50, n=120)
    fit = get(name).fit
    assert fit is not None
    result = run(h, fit, [12, 12, 12], torch.rand(3, 50, generator=torch.Generator()))
    for i, (place, beta, values) in enumerate(entries(result)):
        S = h.Q[i].double() @ h.K[i].double().T * h.scale
        Y = S.softmax(1) @ h.V[i].double()
        logits = S[:, place] + beta.double()
        X = logits.softmax(1)
        wrong = Y - X @ values.double()
        # The error of a least-squares fit is orthogonal to what it fits with.
        assert float((X.T @ wrong).abs().max()) < 1e-4 * float((X.T @ Y).abs().max())
        W = h.W[i].double()
        off = (logits.logsumexp(1) - S.logsumexp(1)).exp() - 1
        mass = ((W**2 * off**2).sum() / (W**2).sum()).sqrt()
        output = ((W * wrong.square().sum(1)).sum() / (W * Y.square().sum(1)).sum()).sqrt()
        assert float(result.mass_error[i]) == pytest.approx(float(mass), rel=1e-3)
        assert float(result.output_error[i]) == pytest.approx(float(output), rel=1e-3)


@pytest.mark.parametrize("name", ["am-omp", "am-highest-attention"])
def test_whole_and_empty_heads_are_stored_as_they_are(name: str) -> None:
    h = heads(H=4, T=30, n=40, dtype=torch.bfloat16)
    fit = get(name).fit
    assert fit is not None
    result = run(h, fit, [30, 0, 7, 1], torch.rand(4, 30, generator=torch.Generator()))
    assert result.heads.lengths == (30, 0, 7, 1)
    found = entries(result)
    assert torch.equal(found[0][2], h.V[0])
    assert bool((found[0][1] == 0).all())
    assert result.output_error.tolist()[:2] == [0, 1]
    assert result.heads.values.unpack().dtype == torch.bfloat16
    assert all(a < b for place, _, _ in found for a, b in pairwise(place))


# ---- budgets -----------------------------------------------------------------------------------


def test_pyramid_falls_linearly_to_a_twentieth() -> None:
    layers = [LayerShape(2, 1000, 8, 8, 2)] * 5
    found = budgets.pyramid(2 * 5 * 100, layers)
    assert found == [[195, 195], [148, 147], [100, 100], [53, 52], [5, 5]]
    for total in (1, 7, 60, 333, 9999):
        sums = [sum(lengths) for lengths in budgets.pyramid(total, layers)]
        assert all(a >= b - 1 for a, b in pairwise(sums))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60)), min_size=1, max_size=6),
    share=st.floats(0, 1),
    name=st.sampled_from(budgets.NAMES),
    seed=st.integers(0, 9),
)
def test_every_budget_spends_exactly_what_there_is(
    sizes: list[tuple[int, int]], share: float, name: str, seed: int
) -> None:
    layers = [LayerShape(H, T, 8, 8, 2) for H, T in sizes]
    total = int(share * sum(H * T for H, T in sizes))
    g = torch.Generator().manual_seed(seed)
    scores = [torch.rand(H, T, generator=g) for H, T in sizes]
    found = budgets.allocate(name, total, layers, scores)
    assert sum(map(sum, found)) == total
    for lengths, (H, T) in zip(found, sizes, strict=True):
        assert len(lengths) == H
        assert all(0 <= t <= T for t in lengths)
    if name in ("pyramid", "uniform"):
        assert found == budgets.unscored(name, total, layers)
    else:
        assert budgets.unscored(name, total, layers) == budgets.unscored("uniform", total, layers)


def test_a_pyramid_that_would_not_fit_keeps_the_first_layer_whole() -> None:
    layers = [SHAPE] * 3
    assert [heads[0] for heads in budgets.pyramid(2 * 3 * 80, layers)] == [100, 80, 60]


def test_adakv_protects_a_fifth_and_shares_the_rest_within_a_layer() -> None:
    g = torch.Generator().manual_seed(0)
    scores = [torch.rand(2, 100, generator=g), torch.rand(2, 100, generator=g)]
    scores[0][0] += 10  # this head would take all of its layer
    scores[1] += 100  # this layer would take all of the budget
    found = budgets.allocate("adakv", 80, [SHAPE] * 2, scores)
    assert found[0] == [36, 4]  # 20 a head on average, of which 4 are safe
    assert sum(found[1]) == 40


def test_global_is_one_ranking_over_all_layers_but_for_the_sinks() -> None:
    g = torch.Generator().manual_seed(0)
    scores = [torch.rand(2, 100, generator=g) for _ in range(2)]
    for layer_scores in scores:
        layer_scores[:, :4] = torch.inf
    found = budgets.allocate("global", 90, [SHAPE] * 2, scores)
    every = torch.cat([s.flatten() for s in scores])
    line = every.topk(90).values.min()
    assert found == [[int((head >= line).sum()) for head in s] for s in scores]
    # Less than all sinks together: every head gets as many as any other.
    assert budgets.allocate("global", 12, [SHAPE] * 2, scores) == [[3, 3], [3, 3]]


def test_an_unknown_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="fair"):
        budgets.allocate("fair", 2, [SHAPE], [])


def test_every_methods_own_budget_is_one_that_can_be_named() -> None:
    own = {get(name).budget for name in names()}
    assert own - {"all"} <= set(budgets.NAMES)
    assert {"pyramid", "global", "uniform", "adaptive"} <= own
