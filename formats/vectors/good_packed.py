"""Files of packed stores that every reader has to accept, and how they are built."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from building import SLIDING, Example, Tensors, aligned, example, integer_codes, layer
from decoding import GROUP, largest_divisor

BYTE = layer("full", 2, 8, 8, None)
"""The narrowest head that every packed store takes."""


def packed(
    stores: str | Sequence[str],
    stored: list[list[int]] | None = None,
    layers: list[dict[str, Any]] | None = None,
    T: int = 6,
) -> Example:
    """A file of one store, or with a store for each layer, of model dtype float16."""
    layers = [BYTE, SLIDING] if layers is None else layers
    it = example("compact", stored or [[1, 3], [3]], layers, T=T, dtype="F16", beta=True)
    each = [
        (stores if spec["type"] == "full" else "native") if isinstance(stores, str) else stores[i]
        for i, spec in enumerate(layers)
    ]
    for i, store in enumerate(each):
        for part in ("keys", "values"):
            dim = layers[i][f"{part[:-1]}_dim"]
            if store != "native":
                del it.tensors[f"layers.{i}.{part}"]
                it.tensors |= codes(f"layers.{i}.{part}", store, it.manifest["stored"][i], dim)
    it.tensors = aligned(it.tensors)
    it.manifest |= {"version": "1.4", "ratio": ratio(it)}
    it.manifest["model"]["dtype"] = "float16"
    features = {f"store-{'packed' if x[0] == 'k' else x}" for x in each if x != "native"}
    if isinstance(stores, str):
        it.manifest["store"] = stores
    else:
        it.manifest |= {"store": "mixed", "stores": list(stores)}
        features |= {"store-mixed"}
    it.manifest["features_required"] = sorted(features)
    return it


def codes(name: str, store: str, stored: Sequence[int], dim: int) -> Tensors:
    """A matrix of codes with what belongs to them; `stored[h]` rows are of head `h`."""
    rows, keys = sum(stored), name.endswith("keys")
    if not store.startswith("k"):
        return integer_codes(name, store, rows, dim)
    bits = int(store[1] if keys else store[3])
    width = dim * bits // 8
    found: Tensors = {name: ("U8", [rows, width], noise(f"{store} {name}", rows * width))}
    if keys:
        groups = sum((t + GROUP - 1) // GROUP for t in stored)
        found[f"{name}.scale"] = halves([groups, dim], f"{store} {name} scale")
        found[f"{name}.zero"] = halves([groups, dim], f"{store} {name} zero", signed=True)
    else:
        blocks = dim // largest_divisor(dim, 64)
        found[f"{name}.scale"] = halves([rows, blocks], f"{store} {name} scale")
    return found


def noise(seed: str, count: int) -> bytes:
    """Bytes without a pattern: a wrong place shows in what they decode to."""
    return hashlib.shake_128(seed.encode()).digest(count)


def halves(shape: list[int], seed: str, signed: bool = False) -> tuple[str, list[int], bytes]:
    """F16 numbers between 2^-5 and 8: what is added to another has to be rounded."""
    words = struct.unpack(f"<{shape[0] * shape[1]}H", noise(seed, 2 * shape[0] * shape[1]))
    found = [word & 1023 | (10 + (word >> 10) % 8) << 10 | (word & signed << 15) for word in words]
    return "F16", shape, struct.pack(f"<{len(found)}H", *found)


def ratio(it: Example) -> float:
    """Section 6, for a model whose numbers take two bytes."""
    full = kept = 0
    for i, spec in enumerate(it.manifest["model"]["layers"]):
        if spec["type"] == "full":
            width = spec["key_dim"] + spec["value_dim"]
            full += it.manifest["logical_length"] * spec["kv_heads"] * width * 2
            start = f"layers.{i}."
            kept += sum(len(x[2]) for name, x in it.tensors.items() if name.startswith(start))
    return round(full / kept, 4) if kept else 1.0


def good_packed() -> Iterator[tuple[str, str, Example]]:
    """Name, what it shows, and the file."""
    five = [layer("full", 5, 8, 8, None)]
    edges = [[0, 1, 63, 64, 65]]
    for store in ("k4v4", "k3v2"):
        reason = "groups end with a head: heads of 0, 1, 63, 64 and 65 entries have six"
        yield f"store-{store}-groups", reason, packed(store, edges, five, T=70)
    for store, dims, reason in (
        ("k8v8", (3, 5), "codes of 8 bits, of odd heads"),
        ("k8v4", (3, 6), "blocks of 6, turned by 2"),
        ("k4v2", (80, 128), "two blocks of 64, turned by 128"),
        ("k4v3", (6, 16), "codes of 3 bits: a plane of 2 bits, then one of 1"),
        ("k3v3", (8, 8), "the shortest planes of 3 bits"),
        ("k3v8", (24, 80), "blocks of 40, turned by 16"),
        ("k2v4", (20, 66), "blocks of 33, turned by 2"),
        ("k2v2", (4, 12), "blocks of 12, turned by 4"),
    ):
        full = layer("full", 2, *dims, None)
        yield f"store-{store}", reason, packed(store, layers=[full, SLIDING])
    it = packed("k4v4")
    extremes = struct.pack("<8e", 0, 2**-24, 2**-14, 1, 65504, 65504, 65504, 2**-24)
    zeros = struct.pack("<8e", 65504, -(2**-24), -0.0, 1 / 3, 65504, -65504, 2**-24, 65504)
    it.tensors["layers.0.keys.scale"] = ("F16", [2, 8], extremes * 2)
    it.tensors["layers.0.keys.zero"] = ("F16", [2, 8], zeros * 2)
    it.tensors["layers.0.values.scale"] = ("F16", [4, 1], extremes[:8])
    yield "store-extremes", "scales of 0, the smallest and the largest; zeros of either sign", it
    yield from good_mixed()


def good_mixed() -> Iterator[tuple[str, str, Example]]:
    """Files with a store for each layer."""
    sliding = layer("sliding", 2, 8, 8, 4)
    stores = ["k4v4", "native", "int4", "int8", "native", "k3v2", "int8", "k2v2"]
    layers = [BYTE, BYTE, BYTE, BYTE, sliding, sliding, sliding, BYTE]
    stored = [[1, 3], [2, 0], [1, 1], [6, 2], [3, 3], [3, 3], [3, 3], [0, 0]]
    yield "store-mixed", "a store for each layer, sliding ones too", packed(stores, stored, layers)
    wide = layer("sliding", 2, 8, 8, 66)
    it = packed(["k4v4", "k4v2"], [[70, 5], [65, 65]], [BYTE, wide], T=70)
    yield "store-mixed-sliding", "a window of 65 entries as codes: two groups a head", it
    it = packed(["native", "native"])
    yield "store-mixed-native", "a list that names no store of codes", it
    it = packed(["int8", "native"])
    yield "store-mixed-alike", "a list where the name alone would do", it
    it = packed(["k8v8"], [[3]], [layer("sliding", 1, 4, 2, 4)])
    yield "store-mixed-all-sliding", "codes, and no full layer: ratio 1", it
