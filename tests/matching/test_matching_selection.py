"""Selection against a greedy that recomputes everything with least squares in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_heads import Heads, heads

from amcli.matching import selection
from amcli.matching.scores import ScoreState
from amcli.matching.selection import OmpSelection, OmpSettings, Target, omp, pursuit_target, top


def rms_scores(h: Heads) -> torch.Tensor:
    H, T, _ = h.K.shape
    state = ScoreState(H, T, dtype=h.K.dtype)
    state.update(h.Q, h.K, h.logits, weights=h.W)
    return state.scores("rms")


def run(h: Heads, lengths: list[int], **options: Any) -> OmpSelection:
    return omp(h.asked(), h.logits, h.K, rms_scores(h), lengths, OmpSettings(**options))


def greedy(
    A: torch.Tensor, F: torch.Tensor, steps: int, gamma: float
) -> tuple[list[int], list[float]]:
    """Pick by ‖B_j‖ / d_j^gamma; every residual from a fresh least-squares projection."""
    chosen: list[int] = []
    curve = []
    for _ in range(steps):
        basis = torch.linalg.qr(A[:, chosen]).Q if chosen else A[:, :0]
        columns = A - basis @ (basis.T @ A)
        residual = F - basis @ (basis.T @ F)
        rule = (columns.T @ residual).norm(dim=1) / columns.square().sum(0) ** gamma
        rule[chosen] = -1.0
        chosen.append(int(rule.argmax()))
        basis = torch.linalg.qr(A[:, chosen]).Q
        curve.append(float((F - basis @ (basis.T @ F)).square().sum() / F.square().sum()))
    return chosen, curve


@pytest.mark.parametrize("target", ["joint", "mass"])
@pytest.mark.parametrize("gamma", [0.0, 0.375, 0.5])
@pytest.mark.parametrize("regime", ["diffuse", "mixed", "sharp"])
def test_single_pivots_equal_exact_greedy(regime: str, gamma: float, target: Target) -> None:
    h = heads(regime, T=40, n=80, dtype=torch.float64)
    got = run(
        h, [12, 7], gamma=gamma, target=target, panel=1, candidates=40, epsilon=1e-9, projections=5
    )
    F = pursuit_target(h.asked(), OmpSettings(target, projections=5))
    for i, t in enumerate((12, 7)):
        A = h.W[i].unsqueeze(1) * torch.softmax(h.Q[i] @ h.K[i].T * h.scale, 1)
        order, curve = greedy(A, F[i], t, gamma)
        assert got.index[i, :t].tolist() == order
        torch.testing.assert_close(
            got.residual[i, :t], torch.tensor(curve).double(), atol=1e-8, rtol=1e-6
        )


def test_target_parts_have_equal_energy() -> None:
    h = heads(n=50)
    queries = h.asked()
    F = pursuit_target(replace(queries, Y=100 * queries.Y), OmpSettings())
    torch.testing.assert_close(F[..., 0], h.W)
    torch.testing.assert_close(
        F[..., 1:].square().sum((1, 2)), h.W.square().sum(1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("panel", [4, 16])
@pytest.mark.parametrize("regime", ["diffuse", "mixed", "sharp"])
def test_panels_fit_about_as_well_as_single_pivots(regime: str, panel: int) -> None:
    h = heads(regime, T=150, n=200)
    single, fast = run(h, [30, 30], panel=1), run(h, [30, 30], panel=panel)
    assert bool((fast.residual[:, -1] <= 1.6 * single.residual[:, -1] + 1e-3).all())


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=2, max_size=2),
    panel=st.integers(1, 20),
    candidates=st.integers(1, 9),
    regime=st.sampled_from(["diffuse", "mixed", "sharp"]),
    seed=st.integers(0, 9),
)
def test_orders_are_distinct_ragged_and_improving(
    lengths: list[int], panel: int, candidates: int, regime: str, seed: int
) -> None:
    h = heads(regime, T=30, n=20, seed=seed)
    got = run(h, lengths, panel=panel, candidates=candidates)
    assert got.index.shape == got.mask.shape == got.residual.shape == (2, max(lengths))
    for i, t in enumerate(lengths):
        kept = got.index[i][got.mask[i]].tolist()
        assert len(kept) == len(set(kept)) == t
        assert bool((got.index[i, t:] == 0).all())
    assert bool((got.residual.diff(dim=1) <= 1e-6).all())
    assert bool(((got.residual >= 0) & (got.residual <= 1)).all())


def test_smaller_budgets_are_prefixes() -> None:
    h = heads(T=80, n=120)
    long = run(h, [20, 20], panel=4, candidates=4)
    short = run(h, [20, 8], panel=4, candidates=4)
    assert torch.equal(long.index[1, :8], short.index[1, :8])
    assert torch.equal(long.index[0], short.index[0])


def test_a_head_is_screened_as_if_it_were_alone() -> None:
    """A longer head beside it must not bring it more candidates."""
    h = heads("mixed", T=120, n=150, dtype=torch.float64)
    together = run(h, [20, 60], candidates=1).index[0, :20].tolist()
    best = top(rms_scores(h), [20, 20]).index[0].tolist()
    assert set(together) == set(best)
    assert together == run(h, [20, 20], candidates=1).index[0].tolist()


def test_exact_duplicates_are_passed_over_until_nothing_else_is_left() -> None:
    h = heads("mixed", T=40, n=80)
    h.K[:, 20:] = h.K[:, :20]  # every key twice
    got = run(h, [30, 30], panel=8)
    for i in range(2):
        assert len({j % 20 for j in got.index[i, :20].tolist()}) == 20
        assert len(set(got.index[i].tolist())) == 30
        assert got.residual[i, 19] == got.residual[i, 29]


def test_panels_full_of_duplicates_do_not_starve_a_head() -> None:
    # 12 groups of 12 copies: a panel's candidates come from few groups, but all are found.
    h = heads("diffuse", T=144, n=200)
    h.K[:] = h.K[:, :12].repeat(1, 12, 1)
    got = run(h, [12, 12], panel=8, candidates=12)
    for i in range(2):
        assert {j % 12 for j in got.index[i].tolist()} == set(range(12))


def test_what_was_not_screened_follows_by_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SCREENED", 2)
    h = heads(T=40, n=80)
    got = run(h, [20, 20], candidates=5)
    by_score = rms_scores(h).sort(dim=1, descending=True, stable=True).indices
    for i in range(2):
        assert set(got.index[i, :10].tolist()) == set(by_score[i, :10].tolist())
        assert got.index[i, 10:].tolist() == by_score[i, 10:20].tolist()


def test_same_seed_same_order() -> None:
    h = heads(T=60, n=90)
    assert torch.equal(run(h, [15, 9], seed=3).index, run(h, [15, 9], seed=3).index)


def test_weights_decide_which_queries_count() -> None:
    h = heads("sharp", H=1, T=30, n=40, d=4, dv=4)
    h.Q[:, :20] = 8 * h.K[:, 3:4]
    h.Q[:, 20:] = 8 * h.K[:, 8:9]
    firsts = []
    for light in (slice(0, 20), slice(20, 40)):
        h.W[:] = 1.0
        h.W[:, light] = 1e-3
        firsts.append(run(h, [1], target="mass").index.item())
    assert firsts[0] != firsts[1]


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3),
    data=st.data(),
)
def test_top_takes_the_best_and_the_earlier_of_equals(
    rows: list[list[int]], data: st.DataObject
) -> None:
    lengths = [data.draw(st.integers(0, 6)) for _ in rows]
    got = top(torch.tensor(rows, dtype=torch.float32), lengths)
    for i, (row, t) in enumerate(zip(rows, lengths, strict=True)):
        want = sorted(range(6), key=lambda j: (-row[j], j))[:t]
        assert got.index[i][got.mask[i]].tolist() == want


@pytest.mark.parametrize("lengths", [[1], [1, -1], [1, 7]])
def test_bad_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit 2 heads of 6 keys"):
        top(torch.rand(2, 6), lengths)
