"""The big-integer search for NaN and infinity agrees with looking at every element."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amkv_format import contents


def one_by_one(data: bytes, dtype: str) -> int | None:
    if dtype == "BF16":
        pairs = struct.iter_unpack("2s", data)
        values = [struct.unpack("<f", b"\0\0" + pair)[0] for (pair,) in pairs]
    else:
        values = [v for (v,) in struct.iter_unpack("<f" if dtype == "F32" else "<e", data)]
    return next((i for i, v in enumerate(values) if not math.isfinite(v)), None)


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(("F32", "BF16", "F16")),
    words=st.lists(st.sampled_from((0x7F80, 0xFF80, 0x7C00, 0xFC01)) | st.integers(0, 65535)),
)
def test_any_bits(dtype: str, words: list[int]) -> None:
    data = struct.pack(f"<{len(words)}H", *words)
    data = data[: len(data) // 4 * 4]
    assert contents.first_non_finite(memoryview(data), dtype) == one_by_one(data, dtype)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("at", [0, 1, 8191, 8192, 16383, 16384, 16385, 39_999])
def test_the_first_one_is_found_in_any_chunk(dtype: str, value: str, at: int) -> None:
    float32 = struct.pack("<f", float(value))
    special = {"F32": float32, "BF16": float32[2:], "F16": struct.pack("<e", float(value))}[dtype]
    data = bytearray(40_000 * len(special))
    data[at * len(special) : (at + 1) * len(special)] = special
    data[-len(special) :] = special
    assert contents.first_non_finite(memoryview(data), dtype) == at


@given(values=st.lists(st.integers(-(2**31), 2**31 - 1)), low=st.integers(-5, 5))
def test_integers_outside_a_range(values: list[int], low: int) -> None:
    data = memoryview(struct.pack(f"<{len(values)}i", *values))
    expected = next(((i, v) for i, v in enumerate(values) if not low <= v <= low + 100), None)
    assert contents.first_outside(data, low, low + 100) == expected
    assert list(contents.int32(data)) == values


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=64).map(lambda data: data[: len(data) // 2 * 2]), at=st.integers(0, 3)
)
def test_scales_that_are_negative_or_not_finite(data: bytes, at: int) -> None:
    data = bytes(32768 * at) + data  # in a later chunk too
    values = [v for (v,) in struct.iter_unpack("<e", data)]
    bad = [not math.isfinite(v) or math.copysign(1, v) < 0 for v in values]
    assert contents.first_bad_scale(memoryview(data)) == (bad.index(True) if any(bad) else None)


@settings(max_examples=200, deadline=None)
@given(codes=st.binary(max_size=40), at=st.integers(0, 2))
def test_codes_outside_their_range(codes: bytes, at: int) -> None:
    data = b"\x77" * (32768 * at) + codes
    signed = [code for (code,) in struct.iter_unpack("<b", data)]
    expected = signed.index(-128) if -128 in signed else None
    assert contents.first_bad_code(memoryview(data), "I8") == expected
    zero = [byte % 16 == 0 or byte // 16 == 0 for byte in data]
    expected = zero.index(True) if any(zero) else None
    assert contents.first_bad_code(memoryview(data), "U8") == expected
