"""Budgets from files: shares scaled to other documents, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from boxes import model, source
from hypothesis import given
from hypothesis import strategies as st

from amcli.errors import ModelMismatchError, UsageError
from amcli.matching.budgets import FLOOR_LEAST, LayerShape
from amcli.pipeline.compaction.budget_file import BudgetFile, scaled, write
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.reading import prefill

LAYERS = [LayerShape(2, 60, 8, 8, 4), LayerShape(3, 40, 8, 8, 4)]
CAPACITY = 2 * 60 + 3 * 40
shares = st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(lambda x: sum(x) > 0)


def by_layer(flat: list[float]) -> list[list[float]]:
    return [[x / sum(flat) for x in flat[:2]], [x / sum(flat) for x in flat[2:]]]


@given(shares, st.integers(0, CAPACITY))
def test_the_total_is_exact_and_within_floor_and_length(flat: list[float], total: int) -> None:
    lengths = scaled(by_layer(flat), total, LAYERS)
    assert [len(heads) for heads in lengths] == [2, 3]
    assert sum(map(sum, lengths)) == total
    least = min(FLOOR_LEAST, total // 5)
    for heads, layer in zip(lengths, LAYERS, strict=True):
        assert all(least <= t <= layer.tokens for t in heads)


@given(shares, st.integers(5 * FLOOR_LEAST, CAPACITY - 1))
def test_more_entries_take_none_from_any_head(flat: list[float], total: int) -> None:
    less, more = (scaled(by_layer(flat), t, LAYERS) for t in (total, total + 1))
    assert all(a <= b for x, y in zip(less, more, strict=True) for a, b in zip(x, y, strict=True))


def test_shares_are_kept_where_they_can_be() -> None:
    assert scaled([[0.5, 0.3], [0.1, 0.05, 0.05]], 100, LAYERS) == [[50, 30], [10, 5, 5]]
    # The first head is full: what it cannot take goes to the others in proportion.
    lengths = scaled([[0.8, 0.1], [0.05, 0.03, 0.02]], 120, LAYERS)
    assert lengths[0] == [60, 30]
    assert lengths[1] == [15, 9, 6]


def test_nothing_is_shared_out_that_is_not_there() -> None:
    for total in (-1, CAPACITY + 1):
        with pytest.raises(ValueError, match="budget of"):
            scaled(by_layer([1.0] * 5), total, LAYERS)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    lengths = {1: [10, 30], 3: [5, 6, 4]}
    write(tmp_path / "b.json", lengths, {"method": "omp"}, overwrite=False)
    budget = BudgetFile.read(tmp_path / "b.json")
    assert budget.layers == [1, 3]
    assert budget.allocate(55, LAYERS) == [[10, 30], [5, 6, 4]]
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["method"] == "omp"
    assert [layer["entries"] for layer in record["layers"]] == list(lengths.values())
    with pytest.raises(UsageError, match="already exists"):
        write(tmp_path / "b.json", lengths, {}, overwrite=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json"]


GOOD: dict[str, Any] = {
    "format": "amkv-budget",
    "version": 1,
    "layers": [{"layer": 0, "shares": [0.5, 0.5]}],
}
BAD = {
    "text": ("hello", "is not a budget file"),
    "another object": ({"format": "x", "version": 1}, "is not a budget file"),
    "a list": ([1], "is not a budget file"),
    "not UTF-8": (b"\xff\xfe", "is not a budget file"),
    "deep": ("[" * 100_000, "is not a budget file"),
    "later version": (GOOD | {"version": 2}, "version 2; this amkv reads version 1"),
    "no version": ({"format": "amkv-budget"}, "version None"),
    "no layers": (GOOD | {"layers": None}, "not numbers from 0 to 1"),
    "negative": (GOOD | {"layers": [{"layer": 0, "shares": [-0.5, 1]}]}, "not numbers from 0 to 1"),
    "nan": (
        '{"format":"amkv-budget","version":1,"layers":[{"layer":0,"shares":[NaN]}]}',
        "not num",
    ),
    "infinite": (
        '{"format":"amkv-budget","version":1,"layers":[{"layer":0,"shares":[Infinity]}]}',
        "not num",
    ),
    "words": (GOOD | {"layers": [{"layer": 0, "shares": ["1"]}]}, "not numbers from 0 to 1"),
    "truth": (GOOD | {"layers": [{"layer": 0, "shares": [True]}]}, "not numbers from 0 to 1"),
    "zero": (GOOD | {"layers": [{"layer": 0, "shares": [0, 0]}]}, "all zero"),
    "empty": (GOOD | {"layers": []}, "all zero"),
    "twice": (GOOD | {"layers": GOOD["layers"] * 2}, "layer 0 twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_no_budgets(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    data = content if isinstance(content, str | bytes) else json.dumps(content)
    path = tmp_path / "b.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UsageError, match=message):
        BudgetFile.read(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        BudgetFile.read(tmp_path)
    with pytest.raises(UsageError, match="is not a file"):
        BudgetFile.read(tmp_path / "no.json")


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(model("pocket"), source(200))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({i: [4, 4] for i in range(8)}, "the file has 8 layers of 2 KV heads, the model 9 layers"),
        ({i: [4, 4, 4] for i in range(9)}, "9 layers of 3 KV heads, the model 9 layers of 2"),
        ({i + 1: [4, 4] for i in range(9)}, r"9 layers \(1, 2, 3, 4, 5, 6, …\) of 2"),
    ],
)
def test_budgets_of_other_models(
    context: Context, tmp_path: Path, layers: dict[int, list[int]], message: str
) -> None:
    write(tmp_path / "b.json", layers, {}, overwrite=False)
    with pytest.raises(ModelMismatchError, match=message) as caught:
        compact(context, Request.of(ratio=5, method="random", budget=str(tmp_path / "b.json")))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("method", ["random", "snapkv", "expected-attention", "highest-attention"])
def test_methods_follow_a_file(context: Context, tmp_path: Path, method: str) -> None:
    flat = [i + 1 for i in range(18)]
    write(tmp_path / "b.json", {i: flat[2 * i : 2 * i + 2] for i in range(9)}, {}, overwrite=False)
    options = Request.of(tokens=19, method=method, budget=str(tmp_path / "b.json"), max_queries=256)
    found = compact(context, options, errors=False)
    single = [LayerShape(1, context.T, 8, 8, 4)] * 18
    wanted = scaled([[t / sum(flat)] for t in flat], 19 * 18, single)
    assert [t for x in found.layers for t in x.lengths] == [heads[0] for heads in wanted]
    assert found.plan.budget == "file"
