"""The value fit against the textbook formula, and λ against what held-out queries say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
import torch
from synthetic_heads import Heads, heads

from amcli.matching.fit_errors import fit_errors
from amcli.matching.mass import fit_beta
from amcli.matching.sample import Queries
from amcli.matching.scores import ScoreState, attention_stats
from amcli.matching.selection import top
from amcli.matching.tiles import gather_rows, key_scale
from amcli.matching.values import LAMBDAS, fit_values

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Queries]


def output_error(
    h: Heads, C_k: torch.Tensor, beta: torch.Tensor | None, C_v: torch.Tensor, queries: Queries
) -> torch.Tensor:
    return fit_errors(queries, h.logits, C_k, beta, C_v).output


def case(h: Heads, t: int) -> Case:
    """`(C_k, beta, V_S, queries)` of the best keys by score."""
    H, T, _ = h.K.shape
    state = ScoreState(H, T)
    state.update(h.Q, h.K, h.logits, weights=h.W)
    index = top(state.scores("rms"), [t] * H).index
    queries = h.asked()
    C_k = gather_rows(h.K, index)
    beta = fit_beta(queries, h.logits, C_k)
    return C_k, beta, gather_rows(h.V, index), queries


@pytest.mark.parametrize("lam", [0.01, 1.0, 30.0])
def test_equals_the_closed_form(lam: float) -> None:
    h = heads(T=90, n=150)
    C_k, beta, V_S, queries = case(h, 14)
    C_v = fit_values(queries, h.logits, C_k, beta, V_S, lam=lam, tile=500)
    error = output_error(h, C_k, beta, C_v, queries)
    for i in range(2):
        root = h.W[i].double().sqrt().unsqueeze(1)
        S = h.Q[i].double() @ C_k[i].double().T * h.scale + beta[i].double()
        X, T = root * torch.softmax(S, 1), root * queries.Y[i].double()
        G = X.T @ X
        ridge = lam * torch.diag(key_scale(G.unsqueeze(0))[0])
        want = torch.linalg.solve(G + ridge, X.T @ T + ridge @ V_S[i].double())
        torch.testing.assert_close(C_v[i].double(), want, atol=2e-3, rtol=2e-3)
        relative = float((X @ C_v[i].double() - T).norm() / T.norm())
        assert error[i].item() == pytest.approx(relative, rel=1e-3)


@pytest.mark.parametrize("lam", [None, inf])
def test_original_values_come_back_bit_for_bit(lam: float | None) -> None:
    h = heads(T=60, n=80, dtype=torch.bfloat16)
    C_k, beta, V_S, queries = case(h, 10)
    C_v = fit_values(replace(queries, W=None), h.logits, C_k, beta, V_S, lam=lam)
    assert C_v.dtype == torch.bfloat16
    assert torch.equal(C_v, V_S)


def test_least_squares_has_the_smallest_error_on_its_own_queries() -> None:
    h = heads(T=120, n=200)
    C_k, beta, V_S, queries = case(h, 20)
    fits = [
        fit_values(queries, h.logits, C_k, beta, V_S, lam=lam) for lam in (0.0, 0.1, 1.0, 10.0, inf)
    ]
    errors = [output_error(h, C_k, beta, C_v, queries) for C_v in fits]
    for smaller, larger in pairwise(errors):
        assert bool((smaller <= larger + 1e-4).all())


def test_near_duplicate_keys_do_not_break_least_squares() -> None:
    h = heads(T=60, n=100)
    C_k, beta, V_S, queries = case(h, 16)
    C_k[:, 8:] = C_k[:, :8]
    C_v = fit_values(replace(queries, W=None), h.logits, C_k, beta, V_S, lam=0.0)
    assert bool(C_v.isfinite().all())
    error, original = (output_error(h, C_k, beta, x, queries) for x in (C_v, V_S))
    assert bool((error < original).all())


@pytest.mark.parametrize("regime", ["diffuse", "mixed", "sharp"])
@pytest.mark.parametrize("n", [40, 400])
def test_held_out_shrinkage_is_never_much_worse_than_the_best_fixed_one(
    regime: str, n: int
) -> None:
    h = heads(regime, H=3, T=200, n=n, seed=5)
    C_k, beta, V_S, queries = case(h, 30)
    new = h.asked(weighted=False, Q=h.Q_new)

    def unseen(lam: object) -> float:
        C_v = fit_values(queries, h.logits, C_k, beta, V_S, lam=lam)  # type: ignore[arg-type]
        return float(fit_errors(new, h.logits, C_k, beta, C_v).output.mean())

    fixed = [unseen(lam) for lam in LAMBDAS]
    assert unseen("held-out") <= 1.15 * min(fixed)
    assert unseen("held-out") < max(fixed)


def test_noise_outputs_leave_the_original_values_alone() -> None:
    # When the kept keys already give the outputs up to noise, any fit is overfitting.
    h = heads("mixed", H=1, T=40, n=64)
    torch.manual_seed(0)
    queries = h.asked(weighted=False)
    noisy = replace(queries, Y=queries.Y + 0.3 * torch.randn_like(queries.Y))
    held = fit_values(noisy, h.logits, h.K, None, h.V, lam="held-out")
    free = fit_values(noisy, h.logits, h.K, None, h.V, lam=0.01)
    assert float((held - h.V).norm()) < 0.3 * float((free - h.V).norm())


def test_a_key_nobody_looked_at_keeps_a_sane_value() -> None:
    h = heads("sharp", H=1, T=60, n=120)
    C_k, beta, V_S, queries = case(h, 12)
    C_k[:, 5] = -3 * h.Q.mean(1)  # next to no weight with any reference query
    C_v = fit_values(replace(queries, W=None), h.logits, C_k, beta, V_S, lam=0.1)
    assert float(C_v[:, 5].abs().max()) < 3 * float(h.V.abs().max())


def test_padding_and_rest_change_nothing() -> None:
    h = heads(T=80, n=100)
    C_k, beta, V_S, queries = case(h, 12)
    queries = replace(queries, W=None)
    C_v = fit_values(queries, h.logits, C_k, beta, V_S, lam=0.1)
    error = fit_errors(queries, h.logits, C_k, beta, C_v)

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, 9 * torch.ones_like(x[:, :3])], dim=1)

    mask = torch.arange(15).expand(2, -1) < 12
    padded = fit_values(queries, h.logits, pad(C_k), pad(beta), pad(V_S), mask=mask, lam=0.1)
    torch.testing.assert_close(padded[:, :12], C_v, atol=2e-3, rtol=2e-3)
    assert bool((padded[:, 12:] == 0).all())
    same = fit_errors(queries, h.logits, pad(C_k), pad(beta), padded, mask=mask)
    torch.testing.assert_close(same.output, error.output, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(same.mass, error.mass, atol=1e-5, rtol=1e-3)
    # The remaining keys of the document as `rest`: nothing is left to correct.
    rest = attention_stats(h.Q, h.K[:, 30:], h.V[:, 30:], h.logits)
    some = fit_values(queries, h.logits, h.K[:, :30], None, h.V[:, :30], rest=rest, lam=0.1)
    none = fit_errors(queries, h.logits, h.K[:, :30], None, some, rest=rest)
    assert float(none.output.max()) < 1e-5
