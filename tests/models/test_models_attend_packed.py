"""The kernels over the stores `k{K}v{V}`, against attention over the unpacked entries in float64.

Without a GPU the kernels run in Triton's interpreter, which cannot multiply bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from test_models_attend_kernels import Case, assert_close, entries, interpreter, random_case

from amcli.entries.catalogue import PACKED
from amcli.entries.prefix import Prefix
from amcli.entries.ragged import Entries, appended
from amcli.entries.stores import quantizer_of
from amcli.kernels.attention.plan import make_plan
from amcli.models.attend import attend
from amcli.serving.batching import BatchedPrefix

STORES = list(PACKED)
LENGTHS = (0, 1, 63, 64, 65, 1000)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Every way to read keys and every one to read values in all dtypes and widths; all pairs in one.
ON_CUDA = [
    (store, d, dtype)
    for store in ("k8v8", "k4v4", "k4v2", "k3v3", "k2v2")
    for d in (64, 128, 256)
    for dtype in DTYPES
] + [(store, 128, torch.bfloat16) for store in STORES]


def case(
    prefix: Prefix, d: int, dv: int, g: int, m: int, dtype: torch.dtype, batch: int = 1
) -> Case:
    H, n = prefix.kv_heads, m + 5
    query = torch.randn(batch, m, H * g, d).to(dtype).transpose(1, 2)
    keys, values = torch.randn(batch, H, n, d).to(dtype), torch.randn(batch, H, n, dv).to(dtype)
    return Case(query, prefix, keys, values, {"scaling": 1.5 * d**-0.5})


def exact(case: Case) -> torch.Tensor:
    """Attention over the same numbers, unpacked, in float64."""
    prefix = case.prefix
    if isinstance(prefix, BatchedPrefix):
        prefix = BatchedPrefix(prefix.entries.unpack(), prefix.kv_heads, prefix.batch)
    else:
        prefix = prefix.entries.unpack()
    query, keys, values = (x.double() for x in (case.query, case.keys, case.values))
    return attend(query, prefix, keys, values, **case.options).to(case.query.dtype)


def joined(d: int, dv: int, store: str, *contexts: tuple[int, ...]) -> Entries:
    """Consecutive contexts as one: their groups begin anew within a head."""
    parts = [entries(t, d, dv, torch.float32, store, i == 0) for i, t in enumerate(contexts)]
    return appended(parts, torch.float32)


@pytest.mark.parametrize("store", STORES)
def test_every_store_is_read(store: str) -> None:
    interpreter()
    torch.manual_seed(0)
    prefix = entries((70, 0, 3), 32, 64, torch.float32, store, True)
    small = case(prefix, 32, 64, 2, 1, torch.float32)
    assert_close(small.fast(), exact(small))


def test_heads_without_entries() -> None:
    interpreter()
    none = case(entries((0, 0), 16, 16, torch.float32, "k4v4", False), 16, 16, 1, 2, torch.float32)
    assert_close(none.fast(), exact(none))


@pytest.mark.parametrize("seed", range(12))
def test_the_kernels_compute_what_float64_does(seed: int) -> None:
    interpreter()
    some = random_case(seed, [torch.float32, torch.float16], 1, STORES)
    assert_close(some.fast(), exact(some))


@pytest.mark.parametrize(("d", "dv"), [(128, 128), (96, 192), (256, 128), (128, 256)])
@pytest.mark.parametrize("store", ["k8v8", "k4v4", "k3v3", "k2v2"])
def test_wide_heads_in_words_of_two_bytes(store: str, d: int, dv: int) -> None:
    interpreter()
    torch.manual_seed(1)
    prefix = entries((66, 5), d, dv, torch.float32, store, False)
    wide = case(prefix, d, dv, 1, 1, torch.float16)
    assert_close(wide.fast(), exact(wide))


@pytest.mark.parametrize("store", ["k4v4", "k3v2"])
def test_groups_of_contexts_that_were_joined(store: str) -> None:
    interpreter()
    torch.manual_seed(2)
    one = joined(16, 32, store, (65, 0, 3), (1, 64, 0), (130, 2, 0))
    other = joined(16, 32, store, (5, 1, 0), (64, 64, 64))
    alone = case(one, 16, 32, 2, 2, torch.float32, 2)
    assert_close(alone.fast(), exact(alone))
    both = case(BatchedPrefix.join([one, other, one]), 16, 32, 2, 1, torch.float32, 3)
    assert_close(both.fast(), exact(both))


def test_tiles_begin_with_groups_and_keep_to_runs() -> None:
    one, other = joined(8, 8, "k4v4", (130, 0), (70, 3)), joined(8, 8, "k4v4", (0, 1), (1, 500))
    prefix = BatchedPrefix.join([one, other])
    runs: list[tuple[int, int, int, int]] = []
    start = group = 0
    for i, t in enumerate(prefix.entries.keys.runs):  # type: ignore[attr-defined]
        runs.append((start, start + t, group, i))
        start, group = start + t, group + -(-t // 64)
    covered: list[int] = []
    for first, count, _, _, _, _, group, _ in make_plan(prefix, 2, 128).tiles.tolist():
        ((begin, end, base, _),) = [x for x in runs if x[0] <= first < x[1]]
        assert first + count <= end
        assert (first - begin) % 64 == 0
        assert group == base + (first - begin) // 64
        covered += range(first, first + count)
    assert covered == list(range(start))


def test_small_numbers_and_large_ones_keep_their_precision() -> None:
    interpreter()
    torch.manual_seed(3)
    for size in (1e-3, 300.0):
        # Channels far from zero, as real keys have them.
        keys = (torch.randn(200, 64) + 20 * torch.randn(64)) * size
        numbers = Entries.of(keys, torch.randn(200, 64) * size, None, (150, 50))
        quantizer = quantizer_of("k4v4")
        assert quantizer is not None
        some = case(quantizer.pack(numbers), 64, 64, 2, 1, torch.float16)
        some.values *= size
        some.options["scaling"] = 0.01 / size
        assert_close(some.fast(), exact(some))


@pytest.mark.gpu
@pytest.mark.parametrize(("store", "d", "dtype"), ON_CUDA)
def test_every_store_on_cuda(store: str, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    parts = [entries(LENGTHS, d, d, torch.float32, store, i == 0) for i in range(2)]
    prefixes: list[tuple[Prefix, int, int]] = [
        (parts[0], 1, 1),
        (parts[1], 2, 70),
        (appended(parts, dtype), 1, 3),
        (BatchedPrefix.join([parts[0], appended(parts, dtype), parts[0]]), 3, 1),
    ]
    for prefix, batch, m in prefixes:
        some = case(prefix, d, d, 4, m, dtype, batch)
        assert_close(some.to("cuda").fast().cpu(), exact(some))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 130))
def test_anything_on_cuda(seed: int) -> None:
    some = random_case(seed, DTYPES, 10, STORES)
    there = some.to("cuda")
    assert_close(there.fast().cpu(), exact(some))
