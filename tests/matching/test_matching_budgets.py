"""Budgets: exact sums, ceilings, floors, and bytes that keep the promised ratio."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amcli.errors import UsageError
from amcli.matching.budgets import (
    LayerShape,
    adaptive,
    entries_for_ratio,
    stored_bytes,
    uniform,
)

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
    # By default a fifth of the mean of 18, but never less than four.
    assert adaptive([quiet, busy], 72) == [[4, 4, 4], [60]]
    assert adaptive([quiet, busy], 160) == [[84, 8, 8], [60]]


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


def test_bias_bytes_count() -> None:
    assert LayerShape(1, 1, 128, 64, 2).entry_bytes() == 192 * 2 + 4
    assert LayerShape(1, 1, 128, 64, 2).entry_bytes(beta=False) == 192 * 2
    assert LayerShape(3, 5, 2, 4, 4).full_bytes == 3 * 5 * 6 * 4


@pytest.mark.parametrize("ratio", [0.5, float("nan"), 1e9])
def test_senseless_ratios_are_usage_errors(ratio: float) -> None:
    with pytest.raises(UsageError) as caught:
        entries_for_ratio(ratio, layers([(2, 10)]))
    assert caught.value.hint
