"""The stores `kKvV` against slow, obvious ones in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amcli.entries import grouped, turned
from amcli.entries.catalogue import BITS, PACKED
from amcli.entries.grouped import GROUP, Grouped, groups
from amcli.entries.matrix import UnstorableError, hadamard
from amcli.entries.planes import multiple, pack_codes, unpack_codes
from amcli.entries.ragged import Entries, appended
from amcli.entries.stores import quantizer_of, read, settled
from amcli.entries.turned import Turned
from amcli.serving.batching import BatchedPrefix

HEADS = (0, 1, 63, 64, 65, 130)
EVERY = sorted(PACKED)


def entries(lengths: tuple[int, ...], d: int = 16, dv: int = 24, seed: int = 0) -> Entries:
    N, generator = sum(lengths), torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(N, n, generator=generator) for n in (d, dv))
    return Entries.of(keys + 3, values, torch.randn(N, generator=generator), lengths)


def same(one: Entries, other: Entries) -> None:
    assert one.lengths == other.lengths
    for (name, x), (there, y) in zip(one.tensors().items(), other.tensors().items(), strict=True):
        assert name == there
        assert torch.equal(x, y)


# ---- bits in bytes ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), times=st.integers(1, 20), N=st.integers(0, 5), data=st.data())
def test_bits_are_where_the_format_says(bits: int, times: int, N: int, data: st.DataObject) -> None:
    d = times * multiple(bits)
    code = st.integers(0, 2**bits - 1)
    codes = data.draw(st.lists(st.lists(code, min_size=d, max_size=d), min_size=N, max_size=N))
    tensor = torch.tensor(codes, dtype=torch.uint8).view(N, d)
    packed = pack_codes(tensor, bits)
    assert packed.shape == (N, d * bits // 8)
    for row, found in zip(codes, packed.tolist(), strict=True):
        assert found == row_of_bytes(row, bits)
    assert torch.equal(unpack_codes(packed, bits), tensor)


def row_of_bytes(codes: list[int], bits: int) -> list[int]:
    """Code by code."""
    found: list[int] = []
    for p, shift in {8: [(8, 0)], 4: [(4, 0)], 3: [(2, 0), (1, 2)], 2: [(2, 0)]}[bits]:
        width = len(codes) * p // 8
        plane = [0] * width
        for column, code in enumerate(codes):
            j, m = divmod(column, width)
            plane[m] |= (code >> shift) % 2**p << p * j
        found += plane
    return found


@pytest.mark.parametrize(("bits", "d"), [(2, 6), (3, 12), (4, 5)])
def test_rows_that_would_end_within_a_byte_are_refused(bits: int, d: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of {multiple(bits)}, not {d}"):
        pack_codes(torch.zeros(2, d, dtype=torch.uint8), bits)
    x = torch.ones(2, d)
    with pytest.raises(ValueError, match="multiple"):
        quantizer_of(f"k{bits}v8").keys(x, (2,))
    with pytest.raises(ValueError, match="multiple"):
        quantizer_of(f"k8v{bits}").values(x, (2,))


# ---- keys ------------------------------------------------------------------------------------


def key_range(x: np.ndarray, bits: int, part: float) -> tuple[float, float]:
    """Zero and scale of one channel of a group."""
    low, high = np.float32(x.min()), np.float32(x.max())
    if part < 1:
        middle = np.float32(np.float32(low + high) * np.float32(0.5))
        reach = np.float32(np.float32(high - low) * np.float32(0.5 * part))
        low, high = np.float32(middle - reach), np.float32(middle + reach)
    zero = np.float16(low)
    scale = np.float16((high - np.float32(zero)) / np.float32(2**bits - 1))
    floor = 0.0 if zero == 0 else 2.0 ** (math.frexp(abs(float(zero)))[1] - 10)
    return float(zero), max(float(scale), floor, 2.0**-14)


def key_codes(x: np.ndarray, zero: float, scale: float, bits: int) -> list[int]:
    ratios = [float((v - np.float32(zero)) / np.float32(scale)) for v in x.astype(np.float32)]
    return [max(0, min(2**bits - 1, round(r))) for r in ratios]


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 9999),
    size=st.sampled_from([1e-7, 1e-3, 1.0, 900.0]),
    offset=st.sampled_from([0.0, 1e-4, -5.0, 3000.0]),
    lengths=st.sampled_from([(5,), (0, 1, 63), (64, 65), (3, 0, 130)]),
)
def test_keys_are_those_of_the_reference(
    bits: int, seed: int, size: float, offset: float, lengths: tuple[int, ...]
) -> None:
    generator, d = torch.Generator().manual_seed(seed), 8
    x = torch.randn(sum(lengths), d, generator=generator) * size + offset
    stored = grouped.quantize(x, lengths, f"k{bits}v8")
    codes, read_back = unpack_codes(stored.codes, bits), stored.unpack()
    g, row = 0, 0
    for t in lengths:
        for start in range(0, t, GROUP):
            n = min(GROUP, t - start)
            for c in range(d):
                numbers = x[row : row + n, c].numpy()
                zero, scale = float(stored.zero[g, c]), float(stored.scale[g, c])
                tried = [key_range(numbers, bits, f) for f in (1, *grouped._NARROWER[bits])]
                assert (zero, scale) in tried
                found = codes[row : row + n, c].tolist()
                assert found == key_codes(numbers, zero, scale, bits)
                means = [zero + scale * code for code in found]  # exact in float64
                assert read_back[row : row + n, c].tolist() == [float(np.float32(m)) for m in means]
                lost = sum((m - float(v)) ** 2 for m, v in zip(means, numbers, strict=True))
                for other in tried:
                    there = key_codes(numbers, *other, bits)
                    off = (
                        other[0] + other[1] * k - float(v)
                        for k, v in zip(there, numbers, strict=True)
                    )
                    assert lost <= sum(o * o for o in off) * (1 + 1e-4) + 1e-30
            g, row = g + 1, row + n
    assert g == len(stored.scale) == groups(lengths)


# ---- values ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 9999),
    size=st.sampled_from([1e-7, 2e-5, 1e-3, 1.0, 900.0]),
    d=st.sampled_from([8, 24, 64, 80, 128]),
)
def test_values_are_those_of_the_reference(bits: int, seed: int, size: float, d: int) -> None:
    x = torch.randn(3, d, generator=torch.Generator().manual_seed(seed)) * size
    stored = turned.quantize(x, f"k8v{bits}")
    b = max(n for n in range(1, min(64, d) + 1) if d % n == 0)
    L, rows = 2**bits - 1, hadamard(x)
    codes = unpack_codes(stored.codes, bits)
    for r in range(3):
        for k in range(d // b):
            y = rows[r, k * b : (k + 1) * b].numpy()
            scale, found = float(stored.scale[r, k]), codes[r, k * b : (k + 1) * b].tolist()
            whole = np.float32(np.abs(y).max()) / np.float32(L)
            parts = (1.0, *turned._NARROWER[bits])
            tried = [max(float(np.float16(whole * np.float32(f))), 2.0**-14) for f in parts]
            assert scale in (*tried, 0.0)
            assert found == value_codes(y, scale, L)
            means = [scale * (2 * code - L) for code in found]
            assert stored.stored()[r, k * b : (k + 1) * b].tolist() == means
            lost = sum((m - float(v)) ** 2 for m, v in zip(means, y, strict=True))
            for other in (*tried, 0.0):
                off = (
                    other * (2 * code - L) - float(v)
                    for code, v in zip(value_codes(y, other, L), y, strict=True)
                )
                assert lost <= sum(o * o for o in off) * (1 + 1e-4) + 1e-30
    torch.testing.assert_close(stored.unpack(), hadamard(stored.stored()), rtol=0, atol=0)


def value_codes(y: np.ndarray, scale: float, L: int) -> list[int]:
    if scale == 0:
        return [0] * len(y)
    ratios = [np.float32(v) / np.float32(scale) + np.float32(L) for v in y]
    return [max(0, min(L, round(float(r * np.float32(0.5))))) for r in ratios]


# ---- both ------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    store=st.sampled_from(EVERY),
    times=st.sampled_from([1, 2, 3, 5, 8, 10, 16]),
    seed=st.integers(0, 9999),
    size=st.sampled_from([1e-8, 1e-5, 2.0**-14, 1e-3, 1.0, 300.0]),
    offset=st.sampled_from([0.0, 1e-3, 8.0, -2000.0]),
    outlier=st.sampled_from([1.0, 1e-6, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_packing_what_was_unpacked_changes_nothing(
    store: str,
    times: int,
    seed: int,
    size: float,
    offset: float,
    outlier: float,
    dtype: torch.dtype,
) -> None:
    generator, d = torch.Generator().manual_seed(seed), 8 * times
    x = torch.randn(sum(HEADS), d, generator=generator) * size
    x[:, seed % d] *= outlier
    x[seed % len(x)] *= 10 * outlier
    x[:, (seed // 3) % d] = offset
    x = x.clamp(-9000, 9000).to(dtype)
    quantizer = quantizer_of(store)
    once = quantizer.pack(Entries.of(x + offset, x, None, HEADS))
    same(quantizer.pack(once.unpack()), once)


@pytest.mark.parametrize("store", EVERY)
def test_a_store_costs_what_it_says(store: str) -> None:
    coded, quantizer = quantizer_of(store).pack(entries(HEADS)), quantizer_of(store)
    tensors = coded.tensors()
    assert list(tensors) == ["keys", "keys.scale", "keys.zero", "values", "values.scale", "beta"]
    begun = sum(math.ceil(t / 64) for t in HEADS)
    N = sum(HEADS)
    assert coded.nbytes == N * (quantizer.entry_bytes(16, 24) + 4) + begun * quantizer.group_bytes(
        16
    )
    assert coded.nbytes == sum(x.numel() * x.element_size() for x in tensors.values())
    k, v = PACKED[store]
    assert quantizer.entry_bytes(16, 24) == Fraction(16 * k + 24 * v, 8) + 2
    for name, tensor in tensors.items():
        assert len(tensor) == quantizer.tensor_rows(name, HEADS)
    assert (coded.store, coded.key_dim, coded.value_dim) == (store, 16, 24)
    same(read(store, tensors, HEADS), coded)


@pytest.mark.parametrize("store", ["k8v8", "k4v2", "k3v3", "k2v4"])
def test_heads_are_those_of_the_whole_however_they_are_cut(store: str) -> None:
    coded = quantizer_of(store).pack(entries(HEADS))
    whole = coded.unpack()
    for h, (one, other) in enumerate(zip(coded.heads(), whole.heads(), strict=True)):
        alone = coded.of_heads(h, h + 1).unpack()
        numbers = one[0], hadamard(one[1])  # values are as stored: for what attention gives
        for x, y, z in zip(
            numbers, other, (alone.keys.unpack(), alone.values.unpack()), strict=False
        ):
            assert torch.equal(x, y)
            assert torch.equal(x, z)
    assert coded.rows([slice(0, 0)], (0,) * 6).nbytes == 0
    parts = [coded.of_heads(0, 2), coded.of_heads(2, 5), coded.of_heads(5, 6)]
    same(Entries.cat(parts), coded)
    same(coded.to("cpu", torch.float16), coded)
    with pytest.raises(ValueError, match="not whole heads"):
        coded.keys.rows([slice(0, 30)])


@pytest.mark.parametrize("store", ["k4v4", "k3v2"])
def test_joined_contexts_are_not_unpacked(store: str) -> None:
    lengths = [(70, 0, 64), (30, 2, 0), (1, 65, 128)]
    parts = [quantizer_of(store).pack(entries(t, seed=i)) for i, t in enumerate(lengths)]
    joined = appended(parts, torch.float32)
    assert (joined.store, joined.lengths) == (store, (101, 67, 192))
    assert joined.nbytes == sum(part.nbytes for part in parts)
    plain = appended([part.unpack() for part in parts], torch.float32)
    for one, other in zip(
        joined.unpack().tensors().values(), plain.tensors().values(), strict=True
    ):
        assert torch.equal(one, other)
    more = appended([joined, parts[1]], torch.float32)
    again = appended([*parts, parts[1]], torch.float32)
    assert torch.equal(more.keys.unpack(), again.keys.unpack())
    for h in range(3):  # heads are still cut where they end
        assert torch.equal(more.of_heads(h, h + 1).keys.unpack(), list(more.heads())[h][0])
    with pytest.raises(ValueError, match="joined entries"):
        joined.tensors()
    same(settled(parts[0]), parts[0])
    file = settled(joined)
    keys = quantizer_of(store).keys(joined.keys.unpack(), joined.lengths)
    assert torch.equal(file.keys.unpack(), keys.unpack())
    same(read(store, file.tensors(), file.lengths), file)


def test_heads_joined_where_a_group_ends_need_not_be_rounded_again() -> None:
    parts = [quantizer_of("k4v4").pack(entries(t)) for t in ((64, 128, 0), (3, 64, 5))]
    joined = appended(parts, torch.float32)
    assert settled(joined) is joined
    file = read("k4v4", joined.tensors(), joined.lengths)
    assert torch.equal(file.keys.unpack(), joined.keys.unpack())


def test_a_batch_sees_each_context_in_its_own_groups() -> None:
    one, two = (quantizer_of("k4v3").pack(entries(t)) for t in ((70, 3), (5, 65)))
    batch = BatchedPrefix.join([one, two, one])
    assert batch.nbytes == one.nbytes + two.nbytes
    for part, own in zip(batch.contexts(), (one, two), strict=True):
        same(part[0], own)
    with pytest.raises(ValueError, match="stored in one way"):
        BatchedPrefix.join([one, quantizer_of("k4v4").pack(entries((5, 65)))])


@pytest.mark.parametrize("store", ["k8v8", "k4v4", "k2v2"])
def test_padding_does_not_change_what_is_rounded(store: str) -> None:
    quantizer, lengths = quantizer_of(store), [70, 0, 65, 9]
    x = torch.randn(4, 80, 16, generator=torch.Generator().manual_seed(0))
    padded = x.clone()
    for h, t in enumerate(lengths):
        padded[h, t:] = 1e6 * (h + 1)
    rounded = quantizer.round_keys(padded, lengths)
    for h, t in enumerate(lengths):
        assert torch.equal(rounded[h, :t], quantizer.keys(x[h, :t], (t,)).unpack())
        assert torch.equal(rounded[h, t:], padded[h, t:])
    for h, head in enumerate(quantizer.round_values(x)):
        assert torch.equal(head, quantizer.values(x[h], (80,)).unpack())


@pytest.mark.parametrize("store", ["k8v8", "k4v4", "k3v3", "k2v2"])
def test_zeros_constants_and_the_tiny(store: str) -> None:
    quantizer = quantizer_of(store)
    for value in (0.0, -0.0, 1e-30, 2.0**-15):
        x = torch.full((70, 16), value)
        assert float((quantizer.keys(x, (70,)).unpack() - x).abs().max()) <= 2.0**-15
        assert float((quantizer.values(x, (70,)).unpack() - x).abs().max()) <= 2.0**-13
    x = torch.randn(1, 16).expand(70, -1)  # channels that do not change: what fp16 loses
    error = (quantizer.keys(x, (70,)).unpack() - x).abs()
    assert bool((error <= x.abs() * 2.0**-11 + 2.0**-14).all())
    assert not quantizer.values(torch.zeros(3, 16), (3,)).unpack().any()


@pytest.mark.parametrize("store", ["k8v8", "k4v4", "k2v2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e8, -3e8])
def test_what_cannot_be_stored_is_refused(store: str, bad: float) -> None:
    quantizer = quantizer_of(store)
    x = torch.ones(3, 70, 64)
    x[1, 66, 7] = bad
    for round_all in (lambda: quantizer.round_keys(x, [70] * 3), lambda: quantizer.round_values(x)):
        with pytest.raises(UnstorableError, match=f"cannot be stored as {store}") as caught:
            round_all()
        assert caught.value.head == 1
    quantizer.round_keys(x, [70, 66, 70])


def test_tensors_that_do_not_fit_are_refused() -> None:
    coded = quantizer_of("k4v4").pack(entries((70, 3)))
    keys, values = coded.keys, coded.values
    assert isinstance(keys, Grouped)
    assert isinstance(values, Turned)
    with pytest.raises(ValueError, match="runs of 70 rows for codes of 73"):
        replace(keys, runs=(70,))
    with pytest.raises(ValueError, match="for 2 groups"):
        replace(keys, runs=(73,))
    with pytest.raises(ValueError, match="scales or zeros"):
        replace(keys, zero=keys.zero[:2])
    with pytest.raises(ValueError, match="for codes of 73 by 24"):
        replace(values, scale=values.scale[:1])
