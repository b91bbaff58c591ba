"""Streaming log-sum-exps, outputs and scores against one query at a time in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_heads import heads

from amcli.matching.scores import SCORE_KINDS, ScoreState, attention_stats, logsumexp
from amcli.matching.tiles import Logits, tile_shape

Reference = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    limit: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Reference:
    """`(lse, Y, P)`, one head and one query at a time."""
    Q, K, V = Q.double(), K.double(), V.double()
    H, n, T = Q.shape[0], Q.shape[1], K.shape[1]
    lse, Y, P = torch.empty(H, n).double(), torch.zeros(H, n, V.shape[2]).double(), None
    P = torch.zeros(H, n, T).double()
    for h in range(H):
        for i in range(n):
            s = K[h] @ Q[h, i] * scale
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            if bias is not None:
                s = s + bias[h].double()
            if limit is not None:
                s = s[: int(limit[i])]
            lse[h, i] = torch.logsumexp(s, 0)
            P[h, i, : len(s)] = torch.softmax(s, 0)
            Y[h, i] = P[h, i] @ V[h]
    return lse, Y, P


@settings(max_examples=40, deadline=None)
@given(
    H=st.integers(1, 3),
    n=st.integers(1, 9),
    T=st.integers(1, 20),
    dv=st.sampled_from([4, 6]),
    tile=st.integers(1, 200),
    softcap=st.sampled_from([None, None, 2.0]),
    limited=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_streaming_equals_reference_for_every_tile(
    H: int, n: int, T: int, dv: int, tile: int, softcap: float | None, limited: bool, biased: bool,
    seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    Q, K = torch.randn(H, n, 6, generator=g), torch.randn(H, T, 6, generator=g)
    V = torch.randn(H, T, dv, generator=g)
    limit = torch.randint(0, T + 1, (n,), generator=g) if limited else None
    bias = torch.randn(H, T, generator=g) if biased else None
    logits = Logits(0.7, softcap)
    lse, Y = attention_stats(Q, K, V, logits, limit=limit, bias=bias, tile=tile)
    want_lse, want_Y, _ = reference(Q, K, V, 0.7, softcap, limit, bias)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Y.double(), want_Y, atol=1e-5, rtol=1e-5)
    alone = logsumexp(Q, K, logits, limit=limit, bias=bias, tile=tile)
    torch.testing.assert_close(alone, lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dv", [6, 4])
def test_keys_that_are_hidden_give_nothing(dv: int) -> None:
    g = torch.Generator().manual_seed(0)
    Q, K = torch.randn(2, 5, 6, generator=g), torch.randn(2, 40, 6, generator=g)
    V = torch.randn(2, 40, dv, generator=g)
    bias = torch.zeros(2, 40)
    bias[0, 7:] = bias[1] = -torch.inf  # the second head shows none at all
    lse, Y = attention_stats(Q, K, V, Logits(0.7), bias=bias)
    want_lse, want_Y, _ = reference(Q, K[:, :7], V[:, :7], 0.7)
    torch.testing.assert_close(lse[0].double(), want_lse[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Y[0].double(), want_Y[0], atol=1e-5, rtol=1e-5)
    assert bool((lse[1] == -torch.inf).all())
    assert bool((Y[1] == 0).all())


def test_large_logits_neither_overflow_nor_vanish() -> None:
    Q, K = torch.full((1, 1, 1), 300.0), torch.tensor([[[-1.0], [1.0], [0.999]]])
    lse, Y = attention_stats(Q, K, torch.eye(3).unsqueeze(0), Logits(1.0), tile=1)
    assert lse.item() == pytest.approx(300 + torch.tensor(-0.3).exp().log1p().item(), rel=1e-6)
    assert Y[0, 0, 0] == 0
    assert Y.sum().item() == pytest.approx(1.0)


@given(
    H=st.integers(1, 64),
    n=st.integers(0, 20_000),
    T=st.integers(0, 60_000),
    tile=st.integers(64, 1 << 24),
)
def test_a_tile_never_outgrows_its_budget(H: int, n: int, T: int, tile: int) -> None:
    rows, columns = tile_shape(H, n, T, tile)
    assert H * rows * columns <= tile
    assert rows >= 1
    assert columns >= 1


def test_rows_that_see_nothing_have_no_mass_and_no_output() -> None:
    h = heads(T=12, n=3)
    limit = torch.tensor([0, 5, 12])
    lse, Y = attention_stats(h.Q, h.K, h.V, h.logits, limit=limit, tile=8)
    assert bool((lse[:, 0] == -torch.inf).all())
    assert bool((Y[:, 0] == 0).all())


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    h = heads(T=30, n=5, dtype=torch.bfloat16)
    lse, Y = attention_stats(h.Q, h.K, h.V, h.logits)
    assert lse.dtype == Y.dtype == torch.float32
    want, want_Y, _ = reference(h.Q, h.K, h.V, h.scale)
    torch.testing.assert_close(lse.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Y.double(), want_Y, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    cut=st.integers(1, 15),
    tile=st.integers(1, 300),
    softcap=st.sampled_from([None, 3.0]),
    limited=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scores_accumulate_over_chunks(
    cut: int, tile: int, softcap: float | None, limited: bool, seed: int
) -> None:
    h = heads(T=22, n=16, seed=seed)
    limit = torch.arange(16) + 3 if limited else None
    state = ScoreState(2, 22)
    for rows in (slice(0, cut), slice(cut, 16)):
        state.update(
            h.Q[:, rows],
            h.K,
            Logits(h.scale, softcap),
            weights=h.W[:, rows],
            limit=None if limit is None else limit[rows],
            tile=tile,
        )
    P = reference(h.Q, h.K, h.V, h.scale, softcap, limit)[2] * h.W.double().unsqueeze(-1)
    want = {"max": P.amax(1), "rms": P.square().mean(1).sqrt(), "mean": P.mean(1)}
    for kind in SCORE_KINDS:
        torch.testing.assert_close(
            state.scores(kind).double(), want[kind], atol=1e-5, rtol=1e-4, msg=kind
        )


@pytest.mark.parametrize("tile", [7, 1000])
def test_keys_fed_since_take_their_share_of_the_softmax(tile: int) -> None:
    h = heads(T=20, n=8)
    K, fed, limit = h.K[:, :14], h.K[:, 14:], torch.tensor([1, 1, 2, 3, 4, 5, 6, 6])
    state = ScoreState(2, 14)
    W = state.update(h.Q, K, h.logits, fed=fed, fed_limit=limit, tile=tile)
    P = reference(h.Q, h.K, h.V, h.scale, limit=limit + 14)[2][:, :, :14]
    torch.testing.assert_close(W.double(), P.sum(-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state.scores("max").double(), P.amax(1), atol=1e-6, rtol=1e-5)


def test_a_mass_that_is_known_and_rows_that_are_wanted_change_no_score() -> None:
    h = heads(T=20, n=8)
    K, fed, limit = h.K[:, :14], h.K[:, 14:], torch.tensor([1, 1, 2, 3, 4, 5, 6, 6])
    found, given_less = ScoreState(2, 14), ScoreState(2, 14)
    asked = {"weights": h.W, "fed": fed, "fed_limit": limit}
    W = found.update(h.Q, K, h.logits, **asked)
    total = logsumexp(h.Q, h.K, h.logits, limit=limit + 14)
    rows = torch.tensor([1, 6])
    some = given_less.update(h.Q, K, h.logits, total=total, rows=rows, **asked)
    torch.testing.assert_close(some, W[:, rows], atol=1e-5, rtol=1e-5)
    for kind in SCORE_KINDS:
        torch.testing.assert_close(given_less.scores(kind), found.scores(kind))


def test_rows_that_see_nothing_count_for_nothing() -> None:
    h = heads(T=12, n=3)
    state, without = ScoreState(2, 12), ScoreState(2, 12)
    W = state.update(h.Q, h.K, h.logits, limit=torch.tensor([0, 5, 12]))
    without.update(h.Q[:, 1:], h.K, h.logits, limit=torch.tensor([5, 12]))
    assert bool((W[:, 0] == 0).all())
    torch.testing.assert_close(state.scores("max"), without.scores("max"))


def test_score_state_refuses_other_shapes_and_kinds() -> None:
    h = heads(T=20, n=8)
    with pytest.raises(ValueError, match="19"):
        ScoreState(2, 19).update(h.Q, h.K, h.logits)
    with pytest.raises(ValueError, match="median"):
        ScoreState(2, 20).scores("median")  # type: ignore[arg-type]


def test_a_query_without_weight_that_sees_nothing_counts_for_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    K, Q = torch.randn(2, 6, 8, generator=g), torch.randn(2, 3, 8, generator=g)
    limit, weights = torch.tensor([0, 4, 6]), torch.tensor([0.0, 0.5, 0.0]).expand(2, 3)
    state, alone = ScoreState(2, 6), ScoreState(2, 6)
    state.update(Q, K, Logits(0.3), limit=limit, weights=weights)
    alone.update(Q[:, 1:2], K, Logits(0.3), limit=limit[1:2], weights=weights[:, 1:2])
    torch.testing.assert_close(state.scores("max"), alone.scores("max"))
    torch.testing.assert_close(state.scores("mean"), alone.scores("mean") / 3)
