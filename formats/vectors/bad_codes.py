"""The files with entries as codes that every reader has to refuse, each wrong in one way."""

from __future__ import annotations

from collections.abc import Iterator

from building import Example, coded, compact, layer, prefill


def bad_stores() -> Iterator[tuple[str, str, str, Example | bytes]]:
    """Codes and scales that do not fit the manifest."""
    it = coded("int8")
    it.manifest["features_required"] = ["store-int4"]
    yield "store-other-feature", "the feature of another store", "field-conflict", it
    it = prefill()
    it.manifest |= {"store": "int8", "features_required": ["store-int8"]}
    yield "store-on-prefill", "a prefill that requires a store", "field-conflict", it
    odd = layer("full", 2, 5, 4, None)
    it = coded("int8", odd)
    it.manifest |= {"store": "int4", "features_required": ["store-int4"]}
    yield "store-int4-odd", "four-bit codes of five numbers", "field-conflict", it
    it = coded("int8")
    del it.tensors["layers.0.values.scale"]
    yield "scale-missing", "codes without scales", "tensor-missing", it
    it = compact()
    it.tensors["layers.0.keys.scale"] = ("F16", [4, 1], b"\0\x3c" * 4)
    yield "scale-on-native", "scales without codes", "tensor-unexpected", it
    it = coded("int4")
    it.tensors["layers.0.keys.scale"] = ("BF16", [4, 1], b"\0\x3c" * 4)
    yield "scale-bf16", "scales of another dtype", "tensor-mismatch", it
    it = coded("int4")
    it.tensors["layers.0.keys.scale"] = ("F16", [4, 2], b"\0\x3c" * 8)
    yield "scale-shape", "scales of more blocks than there are", "tensor-mismatch", it
    it = coded("int8")
    it.tensors["layers.0.keys"] = ("U8", [4, 4], it.tensors["layers.0.keys"][2])
    yield "code-unsigned", "eight-bit codes as unsigned bytes", "tensor-mismatch", it
    it = coded("int4")
    it.tensors["layers.0.keys"] = ("U8", [4, 4], b"\x88" * 16)
    yield "code-unpacked", "four-bit codes, one to a byte", "tensor-mismatch", it
    it = coded("int8")
    it.manifest["ratio"] = compact().manifest["ratio"]
    yield "store-ratio", "a ratio that leaves the codes out of account", "ratio-mismatch", it


def bad_codes() -> Iterator[tuple[str, str, str, Example | bytes]]:
    """Files of codes that open; only `verify` finds what is wrong."""
    for name, store, part, reason, last in (
        ("code-minus-128", "int8", "keys", "an eight-bit code of -128", b"\x80"),
        ("code-low-zero", "int4", "values", "a low four-bit code of 0", b"\x10"),
        ("code-high-zero", "int4", "keys", "a high four-bit code of 0", b"\x01"),
        ("scale-infinite", "int8", "values.scale", "a scale of infinity", b"\0\x7c"),
        ("scale-nan", "int4", "keys.scale", "a scale of NaN", b"\1\x7e"),
        ("scale-negative", "int4", "values.scale", "a scale of -1", b"\0\xbc"),
    ):
        it = coded(store)
        dtype, shape, data = it.tensors[f"layers.0.{part}"]
        changed = data[: -len(last)] + last
        it.tensors[f"layers.0.{part}"] = (dtype, shape, changed)
        yield name, reason, name.partition("-")[0], it
