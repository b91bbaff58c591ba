"""The codec of 8- and 4-bit entries against a slow, obvious one in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amcli.entries.blocks import BlockQuantizer, Blocks, block_size
from amcli.entries.matrix import UnstorableError, hadamard
from amcli.entries.ragged import Entries
from amcli.entries.stores import quantizer_of

BITS = {8: BlockQuantizer("plain8", 8, rotate=False), 4: BlockQuantizer("plain4", 4, rotate=False)}
FLOAT16 = np.finfo(np.float16)


def reference(row: list[float], bits: int) -> tuple[list[int], list[float]]:
    """Codes and scales of one row, number by number."""
    d, levels = len(row), 127 if bits == 8 else 7
    b = max(n for n in range(1, min(32, d) + 1) if d % n == 0)
    codes, scales = [], []
    for start in range(0, d, b):
        block = row[start : start + b]
        wanted = float(np.float32(max(map(abs, block))) / np.float32(levels))
        scale = float(np.float16(min(max(wanted, float(FLOAT16.tiny)), float(FLOAT16.max))))
        scales.append(scale)
        for x in block:
            ratio = float(np.float32(x) / np.float32(scale))
            codes.append(max(-levels, min(levels, round(ratio))))  # Python rounds half to even too
    return codes, scales


def codes_of(packed: Blocks) -> list[list[int]]:
    if packed.codes.dtype == torch.int8:
        return packed.codes.tolist()
    return [
        [code - 8 for byte in row for code in (byte % 16, byte // 16)]
        for row in packed.codes.tolist()
    ]


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
numbers = st.one_of(
    floats,
    st.floats(-10, 10, width=32),
    st.sampled_from([0.0, -0.0, 1e-8, 2.0**-14, 7 * 65504.0, -127 * 65504.0, 3.4e38]),
)


@st.composite
def rows(draw: st.DrawFn) -> list[list[float]]:
    d = draw(st.sampled_from([2, 6, 10, 32, 40, 64, 74, 96]))
    return draw(st.lists(st.lists(numbers, min_size=d, max_size=d), min_size=1, max_size=3))


@settings(max_examples=150, deadline=None)
@given(rows=rows(), bits=st.sampled_from([8, 4]))
def test_codes_and_scales_are_those_of_the_reference(rows: list[list[float]], bits: int) -> None:
    packed = BITS[bits].quantize(torch.tensor(rows), rotate=False)
    for row, codes, scales in zip(rows, codes_of(packed), packed.scale.tolist(), strict=True):
        assert (codes, scales) == reference(row, bits)
    unpacked = packed.unpack().double()
    b = block_size(len(rows[0]))
    exact = torch.tensor(codes_of(packed)).double() * packed.scale.double().repeat_interleave(b, 1)
    assert torch.equal(unpacked, exact)  # float32 holds a code times a scale exactly


@settings(max_examples=100, deadline=None)
@given(rows=rows(), bits=st.sampled_from([8, 4]))
def test_a_number_is_off_by_half_a_step_at_most(rows: list[list[float]], bits: int) -> None:
    x = torch.tensor(rows)
    packed = BITS[bits].quantize(x, rotate=False)
    step = packed.scale.double().repeat_interleave(block_size(x.shape[1]), 1)
    largest = (127 if bits == 8 else 7) * 65504.0
    off = (packed.unpack().double() - x.double().clamp(-largest, largest)).abs()
    assert bool((off <= 0.505 * step).all())  # a scale is itself rounded to 11 bits


@settings(max_examples=150, deadline=None)
@given(rows=rows(), bits=st.sampled_from([8, 4]))
def test_rounding_twice_is_rounding_once(rows: list[list[float]], bits: int) -> None:
    once = BITS[bits].quantize(torch.tensor(rows), rotate=False)
    twice = BITS[bits].quantize(once.unpack(), rotate=False)
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(once.scale, twice.scale)


@settings(max_examples=60, deadline=None)
@given(
    d=st.sampled_from([32, 48, 64, 80, 96, 128, 256]),
    seed=st.integers(0, 999),
    size=st.sampled_from([1e-5, 0.1, 1.0, 300.0]),
    outlier=st.sampled_from([1.0, 100.0]),
)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_keys_as_stored_are_stored_as_they_are(
    name: str, d: int, seed: int, size: float, outlier: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, d, generator=generator) * size
    x[:, seed % d] *= outlier
    quantizer = quantizer_of(name)
    heads = Entries.of(x, x, None, (20,))
    stored = quantizer.pack(heads)
    again = quantizer.pack(stored.unpack())
    for one, two in ((stored.keys, again.keys), (stored.values, again.values)):
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale, two.scale)
    assert torch.equal(quantizer.round_keys(x[None], [20])[0], stored.keys.unpack())
    assert torch.equal(quantizer.round_values(x[None])[0], stored.values.unpack())


@pytest.mark.parametrize("d", [1, 2, 3, 12, 64, 80, 128])
def test_hadamard_is_orthonormal_and_its_own_inverse(d: int) -> None:
    n = d & -d
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = torch.block_diag(*[matrix / math.sqrt(n)] * (d // n))
    x = torch.randn(7, d, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard(x).double(), x.double() @ matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=1e-6)


def test_a_turn_keeps_a_few_large_channels_from_spoiling_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    K = torch.randn(300, 128, generator=generator)
    q = torch.randn(50, 128, generator=generator)
    K[:, [5, 40, 77, 100]] += 12.0
    plain = BlockQuantizer("plain", 4, rotate=False).keys(K, (300,)).unpack()
    turned = quantizer_of("int4").keys(K, (300,)).unpack()

    def off(rounded: torch.Tensor) -> float:
        # What all keys have in common changes no softmax.
        error = q @ (rounded - K).T
        return float((error - error.mean(1, keepdim=True)).norm())

    assert off(turned) < 0.6 * off(plain)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    x = torch.ones(4, 3, 32)
    x[2, 1, 7] = bad
    with pytest.raises(UnstorableError, match="NaN or infinity") as values:
        quantizer_of(name).round_values(x)
    with pytest.raises(UnstorableError, match="NaN or infinity") as keys:
        quantizer_of(name).round_keys(x, [3, 0, 2, 1])
    assert values.value.head == keys.value.head == 2
    rounded = quantizer_of(name).round_keys(x, [3, 0, 1, 1])  # padding may be anything
    assert torch.equal(rounded.isnan(), x.isnan())


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_and_extremes_of_every_dtype(name: str, dtype: torch.dtype) -> None:
    quantizer = quantizer_of(name)
    zero = torch.zeros(1, 4, 64, dtype=dtype)
    assert torch.equal(quantizer.round_keys(zero, [4]), torch.zeros(1, 4, 64))
    largest = torch.full((1, 4, 64), torch.finfo(dtype).max, dtype=dtype)
    for rounded in (quantizer.round_keys(largest, [4]), quantizer.round_values(-largest)):
        assert rounded.dtype == torch.float32
        assert bool(rounded.isfinite().all())
    assert float(quantizer.round_values(largest).max()) >= min(65000.0, torch.finfo(dtype).max)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("lengths", [(0, 0), (3, 0, 5), (1,)])
def test_heads_are_those_of_the_whole(name: str, lengths: tuple[int, ...]) -> None:
    N = sum(lengths)
    generator = torch.Generator().manual_seed(N)
    keys, values = (torch.randn(N, d, generator=generator) for d in (64, 48))
    stored = quantizer_of(name).pack(Entries.of(keys, values, torch.arange(float(N)), lengths))
    whole = stored.unpack()
    assert (stored.key_dim, stored.value_dim, stored.offsets) == (64, 48, whole.offsets)
    assert stored.nbytes == N * (quantizer_of(name).entry_bytes(64, 48) + 4)
    for one, other in zip(stored.heads(), whole.heads(), strict=True):
        # In 4 bits keys come as stored, for queries that are transformed too.
        assert torch.equal(hadamard(one[0]) if stored.rotated else one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert one[2] is not None
        assert other[2] is not None
        assert torch.equal(one[2], other[2])


def test_long_heads_are_unpacked_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amcli.entries.ragged._UNPACK_ELEMENTS", {"cpu": 128 * 4})
    stored = quantizer_of("int8").pack(
        Entries.of(torch.ones(9, 64), torch.ones(9, 64), None, (6, 2, 1))
    )
    held = [keys.untyped_storage().nbytes() // (4 * 64) for keys, _, _ in stored.heads()]
    assert held == [6, 3, 3]


@pytest.mark.parametrize(
    ("d", "int8", "int4"), [(64, 2 * (64 + 4), 2 * (32 + 4)), (128, 2 * (128 + 8), 2 * (64 + 8))]
)
def test_bytes_of_an_entry(d: int, int8: int, int4: int) -> None:
    assert quantizer_of("int8").entry_bytes(d, d) == int8
    assert quantizer_of("int4").entry_bytes(d, d) == int4


def test_an_odd_dimension_and_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="even head dimension, not 5"):
        quantizer_of("int4").keys(torch.ones(2, 5), (2,))
    assert quantizer_of("int8").keys(torch.ones(2, 5), (2,)).shape == (2, 5)
    assert quantizer_of("native") is None
    with pytest.raises(ValueError, match="unknown store 'int2'"):
        quantizer_of("int2")


def test_shapes_that_disagree_are_refused() -> None:
    good = quantizer_of("int8").pack(Entries.of(torch.ones(3, 64), torch.ones(3, 64), None, (3,)))
    for change in (
        {"lengths": (2,)},
        {"beta": torch.zeros(2)},
        {"beta": torch.zeros(3, dtype=torch.float16)},
        {"values": good.values.rows([slice(0, 2)])},
    ):
        with pytest.raises(ValueError, match=r"rows|float32"):
            replace(good, **change)
    with pytest.raises(ValueError, match="scales"):
        Blocks(good.keys.codes, good.keys.scale[:, :1], False)
