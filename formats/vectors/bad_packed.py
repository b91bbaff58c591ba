"""The files of packed and mixed stores that every reader has to refuse, each wrong in one way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from building import SLIDING, Example, aligned, coded, compact, layer, prefill
from good_packed import BYTE, codes, halves, packed, ratio

Bad = Iterator[tuple[str, str, str, Example | bytes]]


def bad_packed() -> Bad:
    """Packed stores that do not fit the manifest, or tensors that do not fit the store."""
    it = packed("k4v4")
    it.manifest["features_required"] = []
    yield "packed-without-feature", "a packed store that no feature names", "field-conflict", it
    it = compact()
    it.manifest["features_required"] = ["store-packed"]
    yield "feature-without-packed", "the feature, and no packed store", "field-conflict", it
    for store in ("k5v4", "k4v1", "k4", "k04v4", "K4V4", "k4v4 "):
        it = packed("k4v4")
        it.manifest["store"] = store
        name = "packed-" + store.replace(" ", "-space")
        yield name.lower() + "-upper" * (store[0] == "K"), f"store is {store!r}", "field-value", it
    for name, store, dims, reason in (
        ("packed-3-bits-of-4", "k4v3", (8, 4), "values of 3 bits: rows of 4, not of 8 n"),
        ("packed-2-bits-of-6", "k2v8", (6, 8), "keys of 2 bits: rows of 6, not of 4 n"),
        ("packed-4-bits-of-5", "k8v4", (8, 5), "values of 4 bits: rows of an odd length"),
    ):
        it = packed("k8v8", layers=[layer("full", 2, *dims, None), SLIDING])
        it.manifest["store"] = store
        yield name, reason, "field-conflict", it
    yield from bad_shapes()
    it = packed("k4v4")
    del it.tensors["layers.0.keys.zero"]
    yield "zero-missing", "keys without zeros", "tensor-missing", it
    for name, base, tensor, reason in (
        ("zero-on-values", packed("k4v4"), "values.zero", "zeros of values"),
        ("zero-on-int4", coded("int4"), "keys.zero", "zeros of codes that have none"),
    ):
        base.tensors[f"layers.0.{tensor}"] = halves([2, 8], name)
        base.tensors = aligned(base.tensors)
        yield name, reason, "tensor-unexpected", base
    it = packed("k4v4")
    groups = 2 * 2 * 2 * 8
    whole = 6 * 2 * 16 * 2
    it.manifest["ratio"] = round(whole / (whole / it.manifest["ratio"] - groups), 4)
    yield "packed-ratio", "a ratio without scales and zeros of keys", "ratio-mismatch", it


def bad_shapes() -> Bad:
    """One tensor of another shape or dtype than its store has."""
    long = packed("k4v4", [[65, 0], [3]], T=70)
    wide = packed("k4v4", layers=[layer("full", 2, 8, 64, None), SLIDING])
    for name, it, tensor, changed, reason in (
        ("groups-few", long, "keys.scale", halves([1, 8], "few"), "65 entries in one group"),
        ("groups-many", long, "keys.zero", halves([3, 8], "many"), "a group of an empty head"),
        (
            "groups-across-heads",
            packed("k4v4"),
            "keys.scale",
            halves([1, 8], "across"),
            "one group for entries of two heads",
        ),
        (
            "groups-of-rows",
            packed("k4v4"),
            "keys.zero",
            halves([4, 8], "rows"),
            "a zero for every entry",
        ),
        (
            "packed-blocks-of-32",
            wide,
            "values.scale",
            halves([4, 2], "blocks"),
            "values in blocks of 32, as other stores have them",
        ),
        (
            "zero-bf16",
            packed("k4v4"),
            "keys.zero",
            ("BF16", [2, 8], bytes(32)),
            "zeros of another dtype",
        ),
        (
            "packed-signed",
            packed("k8v8"),
            "values",
            ("I8", [4, 8], bytes(32)),
            "codes as signed bytes",
        ),
        (
            "packed-3-bits-in-4",
            packed("k3v3"),
            "keys",
            ("U8", [4, 4], bytes(16)),
            "codes of 3 bits in rows as long as of 4",
        ),
    ):
        tensors = dict(it.tensors)
        tensors[f"layers.0.{tensor}"] = changed
        made = Example(dict(it.manifest), tensors)
        yield name, reason, "tensor-mismatch", made


def bad_mixed() -> Bad:
    """What is wrong with `stores`."""
    both = [BYTE, layer("sliding", 2, 8, 8, 4)]

    def mixed(**changes: Any) -> Example:
        it = packed(["k4v4", "k3v2"], [[1, 3], [3, 3]], both)
        it.manifest |= changes
        return it

    it = mixed()
    del it.manifest["stores"]
    yield "stores-missing", "a mixed store without a list", "field-missing", it
    for name, listed, code, reason in (
        ("stores-short", ["k4v4"], "field-conflict", "a store for one of two layers"),
        ("stores-long", ["k4v4", "k3v2", "native"], "field-conflict", "a store too many"),
        ("stores-text", "k4v4", "field-type", "stores is text"),
        ("stores-number", ["k4v4", 3], "field-type", "stores holds a number"),
        ("stores-mixed", ["k4v4", "mixed"], "field-value", "the name mixed for a layer"),
        ("stores-unknown", ["k4v4", "k3v1"], "field-value", "a layer of an unknown store"),
    ):
        yield name, reason, code, mixed(stores=listed)
    it = packed("k4v4")
    it.manifest["stores"] = ["k4v4", "native"]
    yield "stores-not-mixed", "a list beside the name of a store", "field-conflict", it
    it = packed("k4v4")
    del it.manifest["store"]
    it.manifest["stores"] = ["k4v4", "native"]
    it.manifest["features_required"] = ["store-mixed", "store-packed"]
    yield "stores-alone", "a list, and no store", "field-conflict", it
    for name, feature in (("mixed-without-feature", "mixed"), ("mixed-without-packed", "packed")):
        it = mixed()
        it.manifest["features_required"].remove(f"store-{feature}")
        yield name, f"mixed stores without the feature store-{feature}", "field-conflict", it
    it = mixed(features_required=["store-mixed", "store-packed", "store-int8"])
    yield "mixed-other-feature", "the feature of a store that no layer has", "field-conflict", it
    it = prefill()
    it.manifest |= {"store": "mixed", "stores": ["native"] * 2, "version": "1.4"}
    it.manifest["features_required"] = ["store-mixed"]
    yield "mixed-on-prefill", "a prefill that requires mixed stores", "field-conflict", it
    it = packed(["k4v4", "k4v4"], [[1, 3], [3, 3]], both)
    del it.manifest["stores"]
    it.manifest |= {"store": "k4v4", "features_required": ["store-packed"]}
    yield "packed-sliding", "codes in a sliding layer that no list names", "tensor-mismatch", it
    it = mixed(stores=["k3v2", "k4v4"])
    yield "stores-swapped", "the stores of two layers, swapped", "tensor-mismatch", it
    it = packed(["k4v3", "native"])
    it.manifest["stores"] = ["k4v3", "k4v3"]
    yield "stores-sliding-dims", "3 bits in a sliding layer of 2 numbers", "field-conflict", it
    it = packed("k4v4")
    it.tensors |= codes("layers.0.keys", "int4", [1, 3], 8)
    it.manifest["ratio"] = ratio(it)
    yield "packed-as-int4", "a packed store with scales as int4 has", "tensor-mismatch", it


def bad_scales() -> Bad:
    """Packed stores that open; only `verify` finds what is wrong."""
    for name, part, reason, code, last in (
        ("packed-scale-negative", "keys.scale", "a scale of -0 for keys", "scale", b"\0\x80"),
        ("packed-scale-infinite", "keys.scale", "an infinite scale for keys", "scale", b"\0\x7c"),
        ("packed-scale-nan", "values.scale", "a scale of NaN for values", "scale", b"\1\x7e"),
        ("packed-values-negative", "values.scale", "a scale of -1 for values", "scale", b"\0\xbc"),
        ("zero-nan", "keys.zero", "a zero of NaN", "not-finite", b"\1\x7e"),
        ("zero-infinite", "keys.zero", "a zero of -infinity", "not-finite", b"\0\xfc"),
    ):
        it = packed("k3v4")
        dtype, shape, data = it.tensors[f"layers.0.{part}"]
        it.tensors[f"layers.0.{part}"] = (dtype, shape, data[: -len(last)] + last)
        yield name, reason, code, it
    it = packed(["k4v4", "k3v2"], [[1, 3], [3, 3]], [BYTE, layer("sliding", 2, 8, 8, 4)])
    dtype, shape, data = it.tensors["layers.1.keys.zero"]
    it.tensors["layers.1.keys.zero"] = (dtype, shape, data[:-2] + b"\0\x7c")
    yield "zero-of-sliding", "an infinite zero in a sliding layer", "not-finite", it
