"""What the bytes of keys and values mean, number by number and slowly, from section 5 of the
specification. No import of `amkv_format` or `amcli`: their numbers are compared with these."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from building import Example

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
GROUP = 64


def entries(it: Example) -> dict[str, str]:
    """SHA-256 of the keys and of the values of each layer as little-endian 32-bit floats."""
    found = {}
    for i, stored in enumerate(it.manifest["stored"]):
        for part in ("keys", "values"):
            name = f"layers.{i}.{part}"
            rows = decoded(it, name, store_of(it, i), stored)
            raw = b"".join(struct.pack(f"<{len(row)}f", *row) for row in rows)
            found[name] = hashlib.sha256(raw).hexdigest()
    return found


def store_of(it: Example, i: int) -> str:
    """How layer `i` is stored."""
    store: str = (
        it.manifest.get("store", "native") if it.manifest["kind"] == "compact" else "native"
    )
    if store == "mixed":
        return str(it.manifest["stores"][i])
    return store if it.manifest["model"]["layers"][i]["type"] == "full" else "native"


def decoded(it: Example, name: str, store: str, stored: Sequence[int]) -> list[list[float]]:
    """The rows of a matrix; `stored[h]` of them are of head `h`."""
    dtype, (n, width), data = it.tensors[name]
    if store == "native":
        numbers = floats(dtype, data)
        return [numbers[r * width : (r + 1) * width] for r in range(n)]
    rows = [data[r * width : (r + 1) * width] for r in range(n)]
    scales = floats("F16", it.tensors[f"{name}.scale"][2])
    keys = name.endswith("keys")
    if not store.startswith("k"):
        return [integers(store, row, scales, r, keys) for r, row in enumerate(rows)]
    bits = int(store[1] if keys else store[3])
    codes = [unpacked(row, bits) for row in rows]
    if keys:
        zeros = floats("F16", it.tensors[f"{name}.zero"][2])
        return by_channel(codes, scales, zeros, stored)
    return [turned(by_block(row, bits, scales, r)) for r, row in enumerate(codes)]


def unpacked(row: bytes, bits: int) -> list[int]:
    """The codes of a row: column by column, the planes put together from the lowest bits up."""
    columns = 8 * len(row) // bits
    codes = [0] * columns
    start = shift = 0
    for p in PLANES[bits]:
        width = columns * p // 8
        for c in range(columns):
            m, j = c % width, c // width
            codes[c] |= (row[start + m] >> p * j & 2**p - 1) << shift
        start, shift = start + width, shift + p
    return codes


def by_channel(
    codes: list[list[int]], scales: list[float], zeros: list[float], stored: Sequence[int]
) -> list[list[float]]:
    """Packed keys: each head begins a group of its own, and every GROUP entries another."""
    found: list[list[float]] = []
    group = -1
    for t in stored:
        for entry in range(t):
            group += entry % GROUP == 0
            row = codes[len(found)]
            at = group * len(row)
            found.append([f32(zeros[at + c] + scales[at + c] * code) for c, code in enumerate(row)])
    return found


def by_block(row: list[int], bits: int, scales: list[float], r: int) -> list[float]:
    """Row `r` of packed values, before it is turned."""
    block = largest_divisor(len(row), 64)
    first = r * (len(row) // block)
    return [
        f32(scales[first + c // block] * (2 * code - (2**bits - 1))) for c, code in enumerate(row)
    ]


def integers(store: str, row: bytes, scales: list[float], r: int, keys: bool) -> list[float]:
    """Row `r` of the stores `int8` and `int4`."""
    if store == "int8":
        codes = list(struct.unpack(f"<{len(row)}b", row))
    else:
        codes = [nibble - 8 for byte in row for nibble in (byte & 15, byte >> 4)]
    block = largest_divisor(len(codes), 32)
    first = r * (len(codes) // block)
    numbers = [f32(scales[first + c // block] * code) for c, code in enumerate(codes)]
    return turned(numbers) if store == "int4" and keys else numbers


def turned(x: list[float]) -> list[float]:
    """The Hadamard transform, every step in 32-bit floats."""
    n = 1
    while len(x) % (2 * n) == 0:
        n *= 2
    y, h = list(x), 1
    while h < n:
        for i in range(len(y)):
            if not i % n & h:
                y[i], y[i + h] = f32(y[i] + y[i + h]), f32(y[i] - y[i + h])
        h *= 2
    factor = f32(n**-0.5)
    return [f32(number * factor) for number in y]


def largest_divisor(dim: int, most: int) -> int:
    """Numbers of a row that share a scale."""
    return max(b for b in range(1, most + 1) if dim % b == 0)


def floats(dtype: str, data: bytes) -> list[float]:
    """Little-endian floats."""
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    form = {"F32": "f", "F16": "e"}[dtype]
    return list(struct.unpack(f"<{len(data) // struct.calcsize(form)}{form}", data))


def f32(x: float) -> float:
    """A binary64 rounded to a 32-bit float. What it is given is exact in binary64, or the sum of
    two 32-bit floats, for which it does not matter that binary64 rounds first."""
    rounded: float = struct.unpack("<f", struct.pack("<f", x))[0]
    return rounded
