"""NNLS by its optimality conditions and by enumeration; beta by what it is for."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import exp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_heads import Heads, heads

from amcli.matching.fit_errors import fit_errors
from amcli.matching.mass import BETA_RANGE, fit_beta, nnls
from amcli.matching.sample import Queries
from amcli.matching.scores import ScoreState, attention_stats, logsumexp
from amcli.matching.selection import top
from amcli.matching.tiles import Logits, gather_rows


def best_support(G: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """NNLS by trying every support."""
    t = len(b)
    best, value = torch.zeros(t).double(), 0.0
    for size in range(1, t + 1):
        for support in combinations(range(t), size):
            S = list(support)
            w = torch.zeros(t).double()
            w[S] = torch.linalg.solve(G[S][:, S], b[S])
            f = float(0.5 * w @ G @ w - b @ w)
            if bool((w >= 0).all()) and f < value:
                best, value = w, f
    return best


@settings(max_examples=30, deadline=None)
@given(t=st.integers(1, 6), seed=st.integers(0, 999))
def test_nnls_finds_the_best_support(t: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    A = torch.rand(12, t, generator=g).double()
    y = torch.randn(12, generator=g).double()
    G, b = A.T @ A, A.T @ y
    got = nnls(G.unsqueeze(0), b.unsqueeze(0))[0]
    torch.testing.assert_close(got, best_support(G, b), atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    t=st.integers(2, 25), span=st.floats(0, 3), upper=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_nnls_meets_the_optimality_conditions(
    t: int, span: float, upper: float | None, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    A = torch.rand(3, 40, t, generator=g) * 10 ** (-span * torch.rand(3, 1, t, generator=g))
    y = 1 + 0.3 * torch.randn(3, 40, 1, generator=g)
    mask = torch.rand(3, t, generator=g) < 0.8
    mask[:, 0] = True
    G, b = A.mT @ A, (A.mT @ y).squeeze(2)
    w = nnls(G, b, mask, lower=0.01, upper=upper)
    assert bool((w[~mask] == 0).all())
    assert bool((w[mask] >= 0.01 - 1e-7).all())
    size = G.diagonal(dim1=1, dim2=2).sqrt()  # the gradient of the equilibrated problem
    gradient = ((G @ w.unsqueeze(2)).squeeze(2) - b) / size
    low, high = w <= 0.01 * (1 + 1e-5), w >= (upper or 1e9) * (1 - 1e-5)
    tolerance = 1e-4 * float((b / size).abs().max())
    assert bool((gradient[mask & ~low & ~high].abs() <= tolerance).all())
    assert bool((gradient[mask & low] >= -tolerance).all())
    assert bool((gradient[mask & high & ~low] <= tolerance).all())


def test_nnls_is_exact_where_gradients_crawl() -> None:
    # Broad overlapping bumps, as the keys of a diffuse head: condition number above 1e8.
    x, centre = torch.linspace(0, 1, 80).double(), torch.linspace(0, 1, 14).double()
    A = torch.exp(-((x.unsqueeze(1) - centre) ** 2) / (2 * 0.12**2)).unsqueeze(0)
    y = torch.sin(7 * x) + 0.4
    G, b = A.mT @ A, (A.mT @ y.unsqueeze(1)).squeeze(2)
    w = nnls(G, b)[0]
    gradient = G[0] @ w - b[0]
    assert 0 < int((w > 0).sum()) < 14
    assert float(gradient[w > 0].abs().max()) < 1e-4
    assert float(gradient.min()) > -1e-4


def test_nnls_of_singular_and_empty_columns_stays_finite() -> None:
    A = torch.rand(1, 30, 8)
    A[..., 4:] = A[..., :4]
    A[..., 7] = 0.0
    G, b = A.mT @ A, A.mT @ torch.ones(30)
    w = nnls(G, b, lower=0.05)
    assert bool(w.isfinite().all())
    ideal = nnls(G[:, :4, :4], b[:, :4])
    fit = ((A @ w.unsqueeze(2)).squeeze() - 1).norm()
    best = ((A[..., :4] @ ideal.unsqueeze(2)).squeeze() - 1).norm()
    assert fit <= best + 0.1


def mass_error(
    queries: Queries, logits: Logits, C_k: torch.Tensor, beta: torch.Tensor | None, **more: Any
) -> torch.Tensor:
    C_v = C_k.new_zeros(*C_k.shape[:2], queries.Y.shape[-1])
    return fit_errors(queries, logits, C_k, beta, C_v, **more).mass


def chosen(h: Heads, t: int) -> torch.Tensor:
    H, T, _ = h.K.shape
    state = ScoreState(H, T)
    state.update(h.Q, h.K, h.logits, weights=h.W)
    return gather_rows(h.K, top(state.scores("rms"), [t] * H).index)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-8), (torch.float32, 2e-2)])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("regime", ["diffuse", "mixed", "sharp"])
def test_all_keys_need_no_bias(
    regime: str, softcap: float | None, dtype: torch.dtype, rounding: float
) -> None:
    # In float32 two near-duplicates may trade a percent of weight; the mass does not notice.
    h = heads(regime, T=40, n=150, dtype=dtype)
    logits = Logits(h.scale, softcap)
    queries = h.asked(logits=logits)
    beta = fit_beta(queries, logits, h.K)
    assert float(beta.abs().max()) < rounding
    error = mass_error(queries, logits, h.K, beta)
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("regime", ["diffuse", "mixed", "sharp"])
def test_exact_weights_beat_clamped_least_squares_and_no_bias(regime: str) -> None:
    h = heads(regime, T=200, n=300)
    C_k = chosen(h, 40)
    queries = h.asked()
    exact = fit_beta(queries, h.logits, C_k, shrink=0.0)
    A = h.W.unsqueeze(2) * torch.exp(h.Q @ C_k.mT * h.scale - queries.lse.unsqueeze(2))
    w = torch.linalg.lstsq(A.double(), h.W.double().unsqueeze(2)).solution.squeeze(2)
    clamped = w.clamp(*(exp(x) for x in BETA_RANGE)).log().float()
    error, naive, none = (
        mass_error(queries, h.logits, C_k, beta) for beta in (exact, clamped, None)
    )
    assert bool((error <= naive * 1.001).all())
    assert bool((error < none).all())


def test_error_is_the_documented_one() -> None:
    h = heads(T=50, n=30)
    C_k = chosen(h, 10)
    queries = h.asked()
    beta = fit_beta(queries, h.logits, C_k)
    error = mass_error(queries, h.logits, C_k, beta)
    for i in range(2):
        wrong = size = 0.0
        for q, w in zip(h.Q[i].double(), h.W[i].double(), strict=True):
            full = torch.exp(h.K[i].double() @ q * h.scale).sum()
            kept = torch.exp(C_k[i].double() @ q * h.scale + beta[i].double()).sum()
            wrong += float((w * (kept / full - 1)) ** 2)
            size += float(w**2)
        assert error[i].item() == pytest.approx((wrong / size) ** 0.5, rel=1e-4)


def test_padding_changes_nothing() -> None:
    h = heads(T=80, n=100)
    C_k = chosen(h, 12)
    queries = h.asked(weighted=False)
    plain = fit_beta(queries, h.logits, C_k)
    padded = torch.cat([C_k, 100 * torch.ones_like(C_k[:, :5])], dim=1)
    mask = torch.arange(17).expand(2, -1) < 12
    beta = fit_beta(queries, h.logits, padded, mask=mask)
    torch.testing.assert_close(beta[:, :12], plain, atol=1e-3, rtol=1e-3)
    assert bool((beta[:, 12:] == 0).all())


def test_useless_keys_stay_in_the_documented_range() -> None:
    h = heads("diffuse", T=60, n=200)
    some = replace(h.asked(weighted=False), lse=logsumexp(h.Q, h.K[:, :10], h.logits))
    beta = fit_beta(some, h.logits, h.K[:, 1:30], shrink=0.0)
    assert float(beta.min()) == pytest.approx(BETA_RANGE[0], abs=1e-5)
    assert float(beta.max()) <= BETA_RANGE[1]


def test_rest_is_fitted_around() -> None:
    h = heads(T=60, n=200)
    queries = h.asked(weighted=False)
    rest = attention_stats(h.Q, h.K[:, 25:], h.V[:, 25:], h.logits)
    beta = fit_beta(queries, h.logits, h.K[:, :25], rest=rest.lse)
    assert float(beta.abs().max()) < 1e-2  # the other keys need no help
    assert float(mass_error(queries, h.logits, h.K[:, :25], beta, rest=rest).max()) < 1e-4


@pytest.mark.parametrize("factor", [3.0, 100.0])
def test_keys_that_rounding_has_spoilt_get_finite_biases(factor: float) -> None:
    """As 4 bits do to keys with a large constant part: logits far above all the mass there was."""
    h = heads("mixed", H=2, T=60, n=80, d=16, dv=8, seed=1)
    queries = h.asked(weighted=False)
    spoilt = h.K[:, :20] * factor
    spoilt[:, 0] = h.K[:, 0] * 1000
    rest = torch.logsumexp(h.Q @ (h.K[:, 20:] * factor).mT * h.scale, dim=2)
    for others in (None, rest):
        beta = fit_beta(queries, h.logits, spoilt, rest=others)
        assert beta.isfinite().all()
        assert (beta >= BETA_RANGE[0] - 1e-6).all()
        assert (beta <= BETA_RANGE[1] + 1e-6).all()
