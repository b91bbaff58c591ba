"""Heads that real caches have and formulas forget: nothing blows up, and exact stays exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic_heads import Heads, heads
from test_matching_layers import errors, run

from amcli.entries.matrix import Numbers
from amcli.entries.stores import quantizer_of

METHODS = ["omp", "omp-no-bias", "highest-attention"]
LENGTHS = [5, 24]


def equal_keys(h: Heads) -> Heads:
    return replace(h, K=h.K[:, :1].expand_as(h.K).contiguous())


def one_query(h: Heads) -> Heads:
    return replace(h, Q=h.Q[:, :1], W=h.W[:, :1])


def few_queries(h: Heads) -> Heads:
    return replace(h, Q=h.Q[:, :3], W=h.W[:, :3])


def zero_values(h: Heads) -> Heads:
    return replace(h, V=torch.zeros_like(h.V))


def huge_logits(h: Heads) -> Heads:
    return replace(h, Q=h.Q * 300)


def a_sink(h: Heads) -> Heads:
    """The first key takes 99.9% of every query's mass, or more."""
    Q, K = h.Q.clone(), h.K.clone()
    Q[..., -1], K[..., -1] = 1 / h.scale, 0.0
    others = (Q @ K.mT * h.scale).amax()
    K[:, 0] = 0.0
    K[:, 0, -1] = others + 12
    return replace(h, Q=Q, K=K)


def no_weight(h: Heads) -> Heads:
    """No query looks at the document at all."""
    return replace(h, W=torch.full_like(h.W, 1e-30))


CASES = [equal_keys, one_query, few_queries, zero_values, huge_logits, a_sink, no_weight]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_blows_up(name: str, case: object) -> None:
    h = case(heads(T=96, n=80))  # type: ignore[operator]
    result = run(h, name, LENGTHS)
    assert result.heads.lengths == (5, 24)
    for tensor in (
        result.heads.keys.unpack(),
        result.heads.values.unpack(),
        result.output_error,
        result.mass_error,
    ):
        assert bool(tensor.isfinite().all())
    if result.heads.beta is not None:
        assert bool((result.heads.beta.abs() <= 3.001).all())
    for i, (start, t) in enumerate(((0, 5), (5, 24))):
        index = result.index[start : start + t]
        assert len(index.unique()) == t
        # Values stay near those of the document: no solve ran away.
        assert (
            result.heads.values.unpack()[start : start + t].abs().max()
            <= 20 * h.V[i].abs().max() + 1e-6
        )


@pytest.mark.parametrize("name", METHODS)
def test_a_sink_is_kept_and_gives_nearly_the_whole_output(name: str) -> None:
    h = a_sink(heads(T=96, n=80))
    P = torch.softmax(h.Q @ h.K.mT * h.scale, -1)
    assert float(P[..., 0].min()) > 0.999
    result = run(h, name, LENGTHS)
    assert 0 in result.index[:5]
    assert 0 in result.index[5:]
    _, output = errors(h, result, h.Q)
    assert max(output) < 0.02


@pytest.mark.parametrize("name", METHODS)
def test_equal_keys_give_the_mean_value(name: str) -> None:
    """All keys equal: every output is the mean of all values, which shrunk fits come near to."""
    h = equal_keys(heads(T=96, n=80))
    result = run(h, name, [24, 24])
    _, fitted = errors(h, result, h.Q)
    first = Numbers(h.V[:, :24].flatten(0, 1))
    original = replace(result, heads=replace(result.heads, values=first))
    _, kept = errors(h, original, h.Q)
    assert max(fitted) <= max(kept) + 0.05


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("store", ["int8", "int4", "k4v4", "k2v2"])
def test_few_bits_on_degenerate_heads(name: str, store: str) -> None:
    for case in CASES:
        result = run(case(heads(T=96, n=80)), name, LENGTHS, rounding=quantizer_of(store))
        stored = quantizer_of(store).pack(result.heads).unpack()
        assert bool(stored.keys.unpack().isfinite().all())
        assert bool(stored.values.unpack().isfinite().all())
        assert torch.equal(stored.values.unpack(), result.heads.values.unpack())


@pytest.mark.parametrize("name", METHODS)
def test_order_of_heads_and_keys_does_not_matter(name: str) -> None:
    h = heads(H=3, T=80, n=100)
    plain = run(h, name, [10, 20, 30])
    turned = run(
        replace(h, Q=h.Q.flip(0), K=h.K.flip(0), V=h.V.flip(0), W=h.W.flip(0)), name, [30, 20, 10]
    )
    parts = torch.split(plain.index, [10, 20, 30])
    others = torch.split(turned.index, [30, 20, 10])
    if name == "highest-attention":
        assert all(torch.equal(a, b) for a, b in zip(parts, reversed(others), strict=True))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    mixed = run(replace(h, K=h.K[:, order], V=h.V[:, order]), name, [10, 20, 30])
    for a, b in zip(parts, torch.split(order[mixed.index.long()], [10, 20, 30]), strict=True):
        assert len(set(a.tolist()) & set(b.tolist())) >= 0.9 * len(a)
    torch.testing.assert_close(mixed.output_error, plain.output_error, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_scaling_values_scales_what_is_stored(name: str) -> None:
    h = heads(T=80, n=100)
    a, b = run(h, name, [12, 30]), run(replace(h, V=h.V * 64), name, [12, 30])
    assert torch.equal(a.index, b.index)
    torch.testing.assert_close(
        a.heads.values.unpack() * 64, b.heads.values.unpack(), rtol=1e-3, atol=1e-3
    )
