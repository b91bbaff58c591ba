"""Eviction baselines keep exactly what their papers' rules say, computed from dense attention."""

from __future__ import annotations

import pytest
import torch
from dense_heads import Layer, best, context, kept, layer, watch
from hypothesis import given, settings
from hypothesis import strategies as st

from amcli.matching.methods import Look, Watcher, get, names

WITH_QUERIES = ["snapkv", "tova", "h2o", "expected-attention", "pyramidkv"]


def score(name: str, x: Layer, seen: Watcher | None = None, **options: object) -> torch.Tensor:
    rule = get(name).score
    assert rule is not None
    return rule(context(x, seen, **options))


def watched(name: str, x: Layer, cuts: tuple[int, ...] = (), start: int = 0) -> Watcher:
    make = get(name).watch
    assert make is not None
    return watch(x, make(), cuts, start)


def test_the_tools_own_methods_are_listed_first() -> None:
    assert names() == [
        "omp", "omp-no-bias", "highest-attention", "keep", "streaming", "random", "knorm",
        "keydiff", "snapkv", "tova", "h2o", "expected-attention", "pyramidkv", "kvzip",
        "kvzip-uniform", "am-highest-attention", "am-omp",
    ]  # fmt: skip


def test_streaming_keeps_four_sinks_and_the_most_recent() -> None:
    x = layer(T=30)
    for t in (5, 9, 30):
        recent = set(range(30 - (t - 4), 30))
        assert (
            kept("streaming", x, score("streaming", x, entries=t), t) == [{0, 1, 2, 3} | recent] * 2
        )
    # Too few for all sinks: the last token is what a question continues from.
    assert kept("streaming", x, score("streaming", x, entries=3), 3)[0] == {0, 1, 29}
    assert kept("streaming", x, score("streaming", x, entries=1), 1)[0] == {29}


def test_random_depends_on_the_seed_the_layer_and_the_head() -> None:
    x = layer(H=3, T=60)

    def draw(seed: int, number: int) -> list[set[int]]:
        return kept("random", x, score("random", x, seed=seed, layer=number), 12)

    assert draw(0, 1) == draw(0, 1)
    sets = [frozenset(s) for found in (draw(0, 1), draw(0, 2), draw(1, 1)) for s in found]
    assert len(set(sets)) == 9
    counts = torch.zeros(60)
    for seed in range(200):
        for s in draw(seed, 0):
            counts[list(s)] += 1
    assert counts.min() > 60  # 120 are expected
    assert counts.max() < 180


def test_knorm_keeps_the_smallest_keys() -> None:
    x = layer(T=25)
    found = kept("knorm", x, score("knorm", x), 7)
    for h in range(2):
        norms = torch.tensor([float(k.dot(k)) for k in x.K[h]])
        assert found[h] == best(-norms, 7)


def test_keydiff_keeps_the_least_typical_keys() -> None:
    x = layer(T=25)
    found = kept("keydiff", x, score("keydiff", x), 7)
    for h in range(2):
        units = torch.stack([k / k.dot(k).sqrt() for k in x.K[h].double()])
        anchor = sum(units) / 25
        likeness = torch.stack([u.dot(anchor) / anchor.dot(anchor).sqrt() for u in units])
        assert found[h] == best(-likeness, 7)


def snapkv_rule(x: Layer, window: int, t: int) -> list[set[int]]:
    P = x.causal()
    H, G, T, _ = P.shape
    found = []
    for h in range(H):
        mean = torch.zeros(T - window, dtype=torch.float64)
        for g in range(G):
            for i in range(T - window, T):
                mean += P[h, g, i, : T - window] / (G * window)
        pooled = torch.zeros_like(mean)
        for j in range(len(mean)):
            for k in range(max(0, j - 2), min(len(mean), j + 3)):
                pooled[j] += mean[k] / 5
        found.append(best(pooled, t - window) | set(range(T - window, T)))
    return found


@settings(max_examples=12, deadline=None)
@given(
    t=st.integers(8, 35),
    given_window=st.sampled_from([None, 1, 6]),
    softcap=st.sampled_from([None, 2.0]),
    name=st.sampled_from(["snapkv", "pyramidkv"]),
    seed=st.integers(0, 99),
)
def test_snapkv_keeps_what_its_window_looks_at(
    t: int, given_window: int | None, softcap: float | None, name: str, seed: int
) -> None:
    x = layer(T=40, seed=seed, softcap=softcap)
    window = given_window or t // 4  # below 64, a quarter of the entries is the bound
    scores = score(name, x, watched(name, x, (30,), 20), entries=t, window=given_window)
    assert kept(name, x, scores, t) == snapkv_rule(x, window, t)


def test_snapkvs_window_is_64_where_that_is_a_quarter_and_never_more_than_the_budget() -> None:
    x = layer(H=1, G=1, T=300)
    seen = watched("snapkv", x, start=230)
    always = torch.isinf(score("snapkv", x, seen, entries=290)[0]).nonzero().flatten().tolist()
    assert always == list(range(236, 300))
    assert kept("snapkv", x, score("snapkv", x, seen, entries=5, window=50), 5)[0] == {
        295, 296, 297, 298, 299,
    }  # fmt: skip
    short = layer(H=1, G=1, T=3)
    scores = score("snapkv", short, watched("snapkv", short), entries=2, window=9)
    assert kept("snapkv", short, scores, 2)[0] == {1, 2}


@pytest.mark.parametrize("start", [0, 39])
def test_tova_keeps_the_same_tokens_in_all_heads(start: int) -> None:
    x = layer(H=3, T=40)
    found = kept("tova", x, score("tova", x, watched("tova", x, start=start)), 9)
    mean = x.causal()[:, :, -1].mean((0, 1))
    assert found == [best(mean[:-1], 8) | {39}] * 3


@pytest.mark.parametrize("t", [1, 2, 9, 40])
def test_h2o_keeps_heavy_hitters_and_the_recent_half(t: int) -> None:
    x = layer(T=40)
    scores = score("h2o", x, watched("h2o", x, (7, 33)), entries=t)
    mass = x.causal().sum((1, 2))  # over the group and over all queries of the prefill
    recent = set(range(40 - t // 2, 40))
    for h, found in enumerate(kept("h2o", x, scores, t)):
        assert found == recent | best(mass[h, : 40 - t // 2], t - t // 2)


def rotation(d: int, seed: int = 5) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize("budget", ["uniform", "adakv"])
def test_expected_attention_is_that_of_gaussian_queries(budget: str) -> None:
    x = layer(T=40)
    R = rotation(8)
    cuts = (2, 3, 17)  # the first piece is all sinks
    seen = watched("expected-attention", x, cuts)
    scores = score("expected-attention", x, seen, rotation=R, budget=budget)
    epsilon = 0.01 if budget == "adakv" else 0.0
    for h, found in enumerate(kept("expected-attention", x, scores, 12)):
        want = torch.zeros(40, dtype=torch.float64)
        for g in range(3):
            q = x.Q[h, g, 4:].double()
            mean = R.double() @ q.mean(0)
            spread = R.double() @ torch.cov(q.T, correction=0) @ R.double().T
            z = torch.zeros(36, dtype=torch.float64)
            for j, k in enumerate(x.K[h, 4:].double()):
                z[j] = (x.scale * mean.dot(k) + x.scale**2 / 2 * k @ spread @ k).exp()
            want[4:] += z / z.sum() / 3
        want[4:] = (want[4:] + epsilon) * x.V[h, 4:].double().norm(dim=1)
        torch.testing.assert_close(scores[h, 4:].double(), want[4:], rtol=1e-4, atol=1e-7)
        assert found == {0, 1, 2, 3} | {j + 4 for j in best(want[4:], 8)}


def test_the_formula_of_expected_attention_is_the_mean_over_queries() -> None:
    """`E exp(q·k·s)` of actual Gaussian queries, by sampling."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(4, 4, generator=g) * 0.3
    q = torch.randn(400_000, 4, generator=g) @ A.T + torch.tensor([0.5, -0.2, 0.1, 0.3])
    K, V = torch.randn(1, 12, 4, generator=g), torch.ones(1, 12, 1)
    x = Layer(q.view(1, 1, -1, 4), K, V, scale=0.7)
    make = get("expected-attention").watch
    assert make is not None
    seen = make()
    limit, whole = torch.tensor([12]), slice(0, 12)
    seen.update(Look(x.Q, K, limit, None, None, 4, whole, x.logits, unrotated=x.Q))
    found = score("expected-attention", x, seen, rotation=torch.eye(4))[0, 4:]
    z = x.logits(x.Q[0], K[:, 4:]).exp().mean(1)[0]
    torch.testing.assert_close(found, z / z.sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["kvzip", "kvzip-uniform"])
def test_kvzip_scores_each_part_by_its_own_repetition(name: str) -> None:
    x = layer(T=30, seed=3)
    g = torch.Generator().manual_seed(9)
    make = get(name).watch
    assert make is not None
    seen = make()
    want = torch.zeros(2, 30, dtype=torch.float64)
    for part in (slice(0, 17), slice(17, 30)):
        fed, Q = torch.randn(2, 6, 8, generator=g), 2 * torch.randn(2, 3, 6, 8, generator=g)
        for a, b in ((0, 4), (4, 6)):  # fed in two chunks
            seen.update(
                Look(
                    Q[:, :, a:b],
                    x.K,
                    torch.full((b - a,), 30),
                    fed[:, :b],
                    torch.arange(a + 1, b + 1),
                    30 + a,
                    part,
                    x.logits,
                )
            )
        for h in range(2):
            sinks = x.K[h, :4] if part.start else x.K[h, :0]
            for group in range(3):
                for i in range(6):
                    keys = torch.cat([sinks, x.K[h, part], fed[h, : i + 1]]).double()
                    P = (keys @ Q[h, group, i].double() * x.scale).softmax(0)[len(sinks) :]
                    own = P[: part.stop - part.start]
                    want[h, part] = torch.maximum(want[h, part], own)
    scores = score(name, x, seen)
    torch.testing.assert_close(scores[:, 4:].double(), want[:, 4:], rtol=1e-5, atol=1e-7)
    for h, found in enumerate(kept(name, x, scores, 11)):
        assert found == {0, 1, 2, 3} | {j + 4 for j in best(want[h, 4:], 7)}


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_chunks_of_the_pass_do_not_matter(name: str) -> None:
    x = layer(T=40)
    R = rotation(8)
    one, many = (
        score(name, x, watched(name, x, cuts), entries=8, rotation=R) for cuts in ((), (1, 9, 39))
    )
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*WITH_QUERIES, "kvzip"])
def test_a_method_that_watches_says_so_when_it_saw_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="watche"):
        score(name, layer(T=10))
