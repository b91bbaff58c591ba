"""Budgets: exact sums, ceilings, floors, and bytes that keep the promised ratio."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amcli.errors import UsageError
from amcli.matching.budgets import (
    FLOOR_FIRST,
    FLOOR_LEAST,
    LayerShape,
    adaptive,
    allocate,
    entries_for_ratio,
    stored_bytes,
    uniform,
)
from amcli.matching.methods import SINKS

shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 12)), min_size=1, max_size=4)


def layers(pairs: list[tuple[int, int]]) -> list[LayerShape]:
    return [LayerShape(H, T, 8, 8, 2) for H, T in pairs]


@given(pairs=shapes, data=st.data())
def test_uniform_is_even_and_exact(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(H * T for H, T in pairs)))
    lengths = uniform(total, layers(pairs))
    assert [len(x) for x in lengths] == [H for H, _ in pairs]
    assert sum(map(sum, lengths)) == total
    unfilled = [t for x, (_, T) in zip(lengths, pairs, strict=True) for t in x if t < T]
    longest = max(max(x) for x in lengths)
    assert all(t <= T for x, (_, T) in zip(lengths, pairs, strict=True) for t in x)
    assert all(longest - t <= 1 for t in unfilled)


@settings(max_examples=60)
@given(pairs=shapes, floor=st.integers(0, 5), seed=st.integers(0, 99), data=st.data())
def test_adaptive_is_the_global_top_after_the_floors(
    pairs: list[tuple[int, int]], floor: int, seed: int, data: st.DataObject
) -> None:
    total = data.draw(st.integers(0, sum(H * T for H, T in pairs)))
    g = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 9, (H, T), generator=g).float() for H, T in pairs]
    lengths = adaptive(scores, total, floor)
    assert sum(map(sum, lengths)) == total
    heads = sum(H for H, _ in pairs)
    least = min(floor, total // heads)
    kept, dropped = [], []
    for x, s in zip(lengths, scores, strict=True):
        for t, row in zip(x, s, strict=True):
            assert min(least, len(row)) <= t <= len(row)
            ranked = row.sort(descending=True).values.tolist()
            kept += ranked[min(least, len(row)) : t]
            dropped += ranked[t:]
    assert not kept or not dropped or min(kept) >= max(dropped)
    assert adaptive(scores, total, floor) == lengths


def test_adaptive_gives_a_retrieval_head_its_share() -> None:
    quiet, busy = torch.full((3, 100), 1e-3), torch.full((1, 100), 1e-3)
    busy[0, :60] = 0.9
    assert adaptive([quiet, busy], 72, floor=4) == [[4, 4, 4], [60]]
    # By default a tenth of the mean, but never less than four.
    assert adaptive([busy, quiet], 72) == [[60], [4, 4, 4]]
    assert adaptive([busy, quiet], 240) == [[100], [100, 34, 6]]


def test_heads_of_the_first_layer_keep_more() -> None:
    """Whatever they score: every later layer loses what they lose."""
    quiet, busy = torch.full((3, 100), 1e-3), torch.full((1, 100), 0.9)
    assert adaptive([quiet, busy], 108) == [[FLOOR_FIRST] * 3, [60]]
    assert adaptive([busy, quiet, quiet], 108)[1:] == [[FLOOR_LEAST] * 3] * 2
    # A tenth of the mean where that is more, and never more than there are tokens.
    long = [torch.full((1, 400), 1e-3), torch.full((1, 400), 0.9)]
    assert adaptive(long, 400) == [[20], [380]]
    assert adaptive([quiet[:, :10], busy], 100) == [[10] * 3, [70]]


def test_totals_too_small_for_the_floors_are_shared_evenly_first() -> None:
    quiet, busy = torch.full((3, 100), 1e-3), torch.full((1, 100), 0.9)
    assert adaptive([quiet, busy], 63) == [[15] * 3, [18]]
    assert adaptive([quiet, busy], 40) == [[10] * 3, [10]]
    assert adaptive([quiet, busy], 10) == [[2] * 3, [4]]
    assert adaptive([quiet, busy], 3) == [[0] * 3, [3]]
    assert adaptive([quiet, busy], 0) == [[0] * 3, [0]]


def test_only_the_adaptive_budget_favours_the_first_layer() -> None:
    quiet, busy = torch.full((3, 100), 1e-3), torch.full((1, 100), 0.9)
    scores, shape = [quiet, busy], layers([(3, 100), (1, 100)])
    assert allocate("adaptive", 108, shape, scores) == [[FLOOR_FIRST] * 3, [60]]
    assert adaptive(scores, 72, floor=4) == allocate("global", 72, shape, scores)
    assert allocate("global", 72, shape, scores) == [[SINKS] * 3, [72 - 3 * SINKS]]
    # AdaKV: eight keys a head, of which a fifth, one, is sure to each.
    mixed = torch.cat([busy, quiet[:2]])
    assert allocate("adakv", 24, layers([(3, 100)]), [mixed]) == [[22, 1, 1]]


@settings(max_examples=60)
@given(pairs=shapes, seed=st.integers(0, 99), data=st.data())
def test_default_floors_hold_for_any_shape(
    pairs: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    pairs = [(H, 5 * T) for H, T in pairs]
    total = data.draw(st.integers(0, sum(H * T for H, T in pairs)))
    g = torch.Generator().manual_seed(seed)
    lengths = adaptive([torch.rand(H, T, generator=g) for H, T in pairs], total)
    assert sum(map(sum, lengths)) == total
    each = total // sum(H for H, _ in pairs)
    for i, (x, (_, T)) in enumerate(zip(lengths, pairs, strict=True)):
        least = FLOOR_LEAST if i else FLOOR_FIRST
        assert all(min(least, each, T) <= t <= T for t in x)


def test_impossible_totals_are_refused() -> None:
    with pytest.raises(ValueError, match="13 entries for 12 keys"):
        uniform(13, layers([(3, 4)]))
    with pytest.raises(ValueError, match="-1 entries"):
        adaptive([torch.rand(3, 4)], -1)


@given(pairs=shapes, ratio=st.floats(1, 4), beta=st.booleans())
def test_ratio_is_met_and_one_more_entry_would_break_it(
    pairs: list[tuple[int, int]], ratio: float, beta: bool
) -> None:
    shape = layers(pairs)
    full = sum(x.full_bytes for x in shape)
    capacity = sum(H * T for H, T in pairs)
    try:
        entries = entries_for_ratio(ratio, shape, beta=beta)
    except UsageError:
        assert full / ratio < shape[0].entry_bytes(beta)
        return
    assert full / stored_bytes(uniform(entries, shape), shape, beta) >= ratio * (1 - 1e-12)
    if entries < capacity:
        more = stored_bytes(uniform(entries + 1, shape), shape, beta)
        assert full / more < ratio


def test_layers_of_different_cost_are_searched() -> None:
    shape = [LayerShape(2, 100, 128, 128, 2), LayerShape(1, 100, 32, 32, 2)]
    full = sum(x.full_bytes for x in shape)

    def allocate(total: int) -> list[list[int]]:
        return uniform(total, shape)

    careful = entries_for_ratio(10, shape)
    entries = entries_for_ratio(10, shape, allocate=allocate)
    assert full / stored_bytes(allocate(careful), shape) >= 10
    assert full / stored_bytes(allocate(entries), shape) >= 10
    assert full / stored_bytes(allocate(entries + 1), shape) < 10
    assert entries > careful


grouped = st.builds(
    LayerShape, st.integers(1, 4), st.integers(1, 200), st.just(8), st.just(8), st.just(2),
    st.sampled_from([None, 9, 14]), st.sampled_from([0, 3, 64]), st.sampled_from([0, 32, 400]),
)  # fmt: skip


@given(shape=grouped, beta=st.booleans(), data=st.data())
def test_every_begun_group_costs(shape: LayerShape, beta: bool, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=4))
    each = (shape.packed or 32) + 4 * beta
    want = 0
    for t in lengths:
        for i in range(t):
            want += each + (shape.group_bytes if shape.group and i % shape.group == 0 else 0)
    assert shape.stored_bytes(lengths, beta) == want
    more = [t + 1 for t in lengths]
    assert shape.stored_bytes(more, beta) > shape.stored_bytes(lengths, beta)


@settings(max_examples=60)
@given(
    shape=st.lists(grouped, min_size=1, max_size=4),
    name=st.sampled_from(["uniform", "adaptive", "global", "adakv", "pyramid"]),
    ratio=st.floats(1, 40),
    seed=st.integers(0, 99),
)
def test_with_groups_the_ratio_is_met_and_one_more_entry_would_break_it(
    shape: list[LayerShape], name: str, ratio: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = [torch.rand(x.heads, x.tokens, generator=g) for x in shape]

    def share(total: int) -> list[list[int]]:
        return allocate(name, total, shape, scores)

    full, capacity = sum(x.full_bytes for x in shape), sum(x.heads * x.tokens for x in shape)
    try:
        entries = entries_for_ratio(ratio, shape, allocate=share)
    except UsageError:
        assert full / stored_bytes(share(1), shape) < ratio
        return
    assert full / stored_bytes(share(entries), shape) >= ratio * (1 - 1e-12)
    if entries < capacity:
        assert full / stored_bytes(share(entries + 1), shape) < ratio
    if name in ("uniform", "global"):  # nested: a few more entries never cost fewer bytes
        costs = [stored_bytes(share(total), shape) for total in range(0, capacity + 1, 7)]
        assert costs == sorted(costs)


@given(shape=st.lists(grouped, min_size=1, max_size=4), ratio=st.floats(1, 40))
def test_before_scores_are_known_the_ratio_is_met_by_equal_heads(
    shape: list[LayerShape], ratio: float
) -> None:
    full = sum(x.full_bytes for x in shape)
    try:
        entries = entries_for_ratio(ratio, shape)
    except UsageError:
        return
    assert full / stored_bytes(uniform(entries, shape), shape) >= ratio * (1 - 1e-12)


def test_bias_bytes_count() -> None:
    assert LayerShape(1, 1, 128, 64, 2).entry_bytes() == 192 * 2 + 4
    assert LayerShape(1, 1, 128, 64, 2).entry_bytes(beta=False) == 192 * 2
    assert LayerShape(3, 5, 2, 4, 4).full_bytes == 3 * 5 * 6 * 4


@pytest.mark.parametrize("ratio", [0.5, float("nan"), 1e9])
def test_senseless_ratios_are_usage_errors(ratio: float) -> None:
    with pytest.raises(UsageError) as caught:
        entries_for_ratio(ratio, layers([(2, 10)]))
    assert caught.value.hint
