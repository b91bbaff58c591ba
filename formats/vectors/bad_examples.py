"""The files that every reader has to refuse, each wrong in one way."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

from building import (
    FULL,
    Example,
    canonical,
    compact,
    example,
    payload_hash,
    prefill,
    recorded,
    told,
)

BAD_FIELDS: list[tuple[str, str, Any, str]] = [
    ("format-other", "format", "amkw", "format-unknown"),
    ("version-2", "version", "2.0", "version-unsupported"),
    ("version-float", "version", 1.0, "field-type"),
    ("version-word", "version", "1", "field-value"),
    ("feature-unknown", "features_required", ["fp4"], "feature-unsupported"),
    ("kind-unknown", "kind", "cartridge", "field-value"),
    ("created-local", "created", "2026-01-31T12:00:00+01:00", "field-value"),
    ("created-february", "created", "2026-02-31T12:00:00Z", "field-value"),
    ("source-path", "source.name", "../secret.txt", "field-value"),
    ("source-size", "source.bytes", 3, "field-conflict"),
    ("hash-uppercase", "model.config_hash", "sha256:" + "A" * 64, "field-value"),
    ("dtype-model", "model.dtype", "float8", "field-value"),
    ("length-zero", "logical_length", 0, "field-value"),
    ("length-boolean", "logical_length", True, "field-type"),
    ("document-past-end", "document_end", 7, "field-conflict"),
    ("boundary-unknown", "boundary", "assistant", "field-value"),
    ("layers-none", "model.layers", [], "field-value"),
    ("layer-type", "model.layers.0.type", "chunked", "field-value"),
    ("window-missing", "model.layers.1.window", None, "field-type"),
    ("window-on-full", "model.layers.0.window", 4, "field-conflict"),
    ("heads-huge", "model.layers.0.kv_heads", 2**31, "field-value"),
    ("stored-layers", "stored", [[1, 3]], "field-conflict"),
    ("stored-heads", "stored", [[4], [3]], "field-conflict"),
    ("stored-negative", "stored", [[-1, 5], [3]], "field-value"),
    ("stored-above-length", "stored", [[1, 7], [3]], "field-value"),
    ("tail-short", "stored", [[1, 3], [2]], "field-conflict"),
    ("ratio-zero", "ratio", 0, "field-value"),
    ("ratio-wrong", "ratio", 20.0, "ratio-mismatch"),
    ("requested-both", "requested", {"ratio": 2, "tokens": 4}, "field-conflict"),
    ("seed-negative", "seed", -1, "field-value"),
    ("fit-errors-short", "fit_errors", {"mass": [[0.5], []]}, "field-conflict"),
    ("store-unknown", "store", "int2", "field-value"),
    ("store-number", "store", 8, "field-type"),
    ("store-without-feature", "store", "int8", "field-conflict"),
    ("feature-without-store", "features_required", ["store-int4"], "field-conflict"),
    ("stored-other-split", "stored", [[1, 4], [3]], "tensor-mismatch"),
]

BAD_RECORDS: list[tuple[str, str, Any, str]] = [
    ("attention-text", "attention", "most", "field-type"),
    ("attention-heads", "attention", [[0.5], []], "field-conflict"),
    ("attention-negative", "attention", [[0.5, -0.5], []], "field-value"),
    ("fit-errors-negative", "fit_errors", {"mass": [[0.5, -1], []]}, "field-value"),
    ("fidelity-number", "fidelity", 0.99, "field-type"),
    ("fidelity-probes", "fidelity.probes", [{"ratio": 20}], "field-missing"),
    ("requested-fidelity", "requested.fidelity", "high", "field-type"),
    ("held-out-negative", "queries.held_out", -1, "field-value"),
    ("budget-path", "budget.file", "/etc/shares.json", "field-value"),
]

BAD_TOLD: list[tuple[str, str, Any, str]] = [
    ("config-text", "model.config", "llama", "field-type"),
    ("weights-array", "model.weights", [1.0], "field-type"),
    ("weights-number", "model.weights", {"a 4": 1.0}, "field-type"),
    ("weights-none", "model.weights", {"a 4": ""}, "field-value"),
    ("weights-cut", "model.weights", {"a 4": "3f800000bf0000"}, "field-value"),
    ("weights-uppercase", "model.weights", {"a 4": "3F800000"}, "field-value"),
    ("weights-long", "model.weights", {"a 4": "0" * 8200}, "field-value"),
    ("weights-many", "model.weights", {f"a {i}": "00000000" for i in range(4097)}, "field-value"),
    ("turns-hash-null", "tokenizer.turns_hash", None, "field-type"),
    ("turns-hash-short", "tokenizer.turns_hash", "sha256:" + "4" * 63, "field-value"),
]

DEEP = '{"a":' + "[" * 32 + "]" * 32 + ","


def manifest_with(path: str, value: Any, start: Callable[[], Example] = compact) -> Example:
    """A right file but for one field of its manifest, named by its dotted path."""
    it = start()
    target: Any = it.manifest
    *parents, last = path.split(".")
    for key in parents:
        target = target[int(key)] if key.isdigit() else target[key]
    target[last] = value
    it.seal = path != "payload_hash"
    return it


def manifest_without(path: str) -> Example:
    """A right file but for one field that is absent."""
    it = manifest_with(path, None)
    *parents, last = path.split(".")
    target = it.manifest
    for key in parents:
        target = target[key]
    del target[last]
    return it


def manifest_text(change: Callable[[str], str]) -> Example:
    """A right file but for the spelling of its manifest."""
    it = compact()
    it.manifest["payload_hash"] = payload_hash(it.tensors)
    it.manifest_text = change(canonical(it.manifest))
    return it


def entry_with(name: str, key: str, value: Any) -> Example:
    """A right file but for one field of one header entry."""
    it = compact()
    it.entries[name, key] = value
    return it


def header_text(change: Callable[[str], str]) -> Example:
    """A right file but for the spelling of its header."""
    it = compact()
    it.header_text = change
    return it


def tensor_with(name: str, dtype: str, shape: list[int], data: bytes) -> Example:
    """A right file but for one tensor, which is put last; the payload hash is right."""
    it = compact()
    it.tensors.pop(name, None)
    it.tensors[name] = (dtype, shape, data)
    return it


def spelled(old: str, new: str) -> Callable[[str], str]:
    """A change of one place in a text."""
    return lambda text: text.replace(old, new, 1)


def twice(text: str) -> str:
    """The first field once more."""
    return "{" + text[1 : text.index(",") + 1] + text[1:]


def bad_containers() -> Iterator[tuple[str, str, str, Example | bytes]]:
    """Name, what is wrong, the expected code, and the file: the safetensors level."""
    right = compact().file()
    body = right[8:]

    def length(n: int) -> bytes:
        return struct.pack("<Q", n) + body

    yield "empty", "no bytes at all", "file-too-short", b""
    yield "seven-bytes", "less than a header length", "file-too-short", right[:7]
    yield "header-2-63", "a header length of 2^63", "header-too-large", length(2**63)
    yield "header-over-limit", "one step above the limit", "header-too-large", length(2**24 + 8)
    yield "header-past-end", "a header longer than the file", "header-truncated", length(2**20)
    yield "header-unaligned", "a header length of 1001", "misaligned", length(1001)
    yield "pickle", "a Python pickle", "header-too-large", b"\x80\x04\x95\x0c\x00\x00\x00\x00" * 4
    yield (
        "header-no-brace",
        "a header that begins with a space",
        "header-frame",
        header_text(lambda t: " " + t),
    )
    yield (
        "header-tail",
        "something but spaces after the header",
        "header-frame",
        header_text(lambda t: t + "\n"),
    )
    yield (
        "header-not-utf8",
        "the byte FF in the header",
        "header-encoding",
        header_text(lambda t: t.replace("token_ids", "token\udcffids")),
    )
    yield (
        "header-not-json",
        "a missing comma",
        "json-invalid",
        header_text(lambda t: t.replace('"dtype":"F32",', '"dtype":"F32"', 1)),
    )
    yield (
        "header-duplicate",
        "two tensors of one name",
        "json-duplicate-key",
        header_text(
            lambda t: (
                t[:-1]
                + ","
                + t[t.index('"token_ids"') : t.index("}", t.index('"token_ids"'))]
                + "}}"
            )
        ),
    )
    yield (
        "header-bomb",
        "brackets nested 5,000 deep",
        "json-too-deep",
        header_text(lambda t: t[:-1] + ',"x":' + "[" * 5000 + "]" * 5000 + "}"),
    )
    yield (
        "header-huge-integer",
        "an offset of 60 digits",
        "json-number",
        entry_with("token_ids", "data_offsets", [0, 10**60]),
    )
    yield "truncated", "the last byte is gone", "payload-truncated", right[:-1]
    it = compact()
    it.tail = b"\0" * 8
    yield "trailing", "eight bytes after the last tensor", "payload-trailing", it
    it = header_text(lambda t: t)
    it.metadata = {"amkv": 1}
    yield "metadata-number", "a metadata value that is no string", "header-schema", it


def bad_tensors() -> Iterator[tuple[str, str, str, Example | bytes]]:
    """The same for header entries."""
    yield (
        "entry-extra-field",
        "an entry with a fourth field",
        "header-schema",
        entry_with("token_ids", "url", "http://example.com"),
    )
    yield (
        "offsets-three",
        "three offsets",
        "header-schema",
        entry_with("token_ids", "data_offsets", [0, 24, 24]),
    )
    yield (
        "offsets-negative",
        "a negative offset",
        "header-schema",
        entry_with("token_ids", "data_offsets", [-24, 0]),
    )
    yield (
        "offsets-float",
        "an offset of 24.0",
        "header-schema",
        entry_with("token_ids", "data_offsets", [0, 24.0]),
    )
    yield (
        "offsets-reversed",
        "an end before its begin",
        "tensor-size",
        entry_with("token_ids", "data_offsets", [24, 0]),
    )
    yield (
        "offsets-past-end",
        "a tensor of 16 TiB",
        "payload-truncated",
        tensor_entry("token_ids", [2**42], [0, 2**44]),
    )
    yield (
        "overlap",
        "two tensors share eight bytes",
        "payload-overlap",
        tensor_entry("layers.0.beta", [4], [16, 32]),
    )
    yield "gap", "a tensor whose bytes are nobody's", "payload-gap", header_text(without_beta)
    yield (
        "shape-lie",
        "a shape smaller than the bytes",
        "tensor-size",
        entry_with("token_ids", "shape", [5]),
    )
    yield (
        "shape-overflow",
        "dimensions whose product wraps to 24 bytes",
        "tensor-size",
        entry_with("token_ids", "shape", [2**48 - 1, 2**48 - 1, 6]),
    )
    yield (
        "shape-negative",
        "a negative dimension",
        "tensor-shape",
        entry_with("token_ids", "shape", [-6]),
    )
    yield (
        "shape-boolean",
        "a dimension that is true",
        "tensor-shape",
        entry_with("token_ids", "shape", [True, 6]),
    )
    yield "shape-scalar", "no dimension", "tensor-shape", entry_with("token_ids", "shape", [])
    yield (
        "dtype-unknown",
        "a dtype of eight bytes",
        "tensor-dtype",
        entry_with("token_ids", "dtype", "I64"),
    )
    for name, bad in (
        ("name-path", "../../etc/passwd"),
        ("name-backslash", "layers\\0"),
        ("name-unicode", "ext.ключ"),
        ("name-long", "ext." + "x" * 253),
        ("name-empty", ""),
    ):
        yield name, f"a tensor named {bad[:20]!r}", "tensor-name", tensor_with(bad, "F32", [0], b"")
    it = compact(dtype="F16")
    keys = it.tensors.pop("token_ids")
    it.tensors = {"ext.odd": ("F16", [1], b"\0\0"), "token_ids": keys, **it.tensors}
    yield "tensor-unaligned", "four-byte elements at an offset of 2", "misaligned", it


def tensor_entry(name: str, shape: list[int], offsets: list[int]) -> Example:
    """A right file but for shape and offsets of one entry, which agree with each other."""
    it = entry_with(name, "shape", shape)
    it.entries[name, "data_offsets"] = offsets
    return it


def without_beta(header: str) -> str:
    """The header with one entry gone while its bytes stay."""
    start = header.index('"layers.0.beta"')
    return header[:start] + header[header.index("}", start) + 2 :]


def bad_manifests() -> Iterator[tuple[str, str, str, Example | bytes]]:
    """The same for the manifest's JSON and fields."""
    it = compact()
    it.metadata = {"format": "pt"}
    yield "foreign", "a safetensors file of something else", "metadata", it
    it = compact()
    it.metadata = {"amkv": canonical(it.manifest), "format": "pt"}
    yield "metadata-extra", "a second metadata key", "metadata", it
    texts: list[tuple[str, str, str, Callable[[str], str]]] = [
        ("manifest-array", "an array", "field-type", lambda t: "[]"),
        ("manifest-cut", "half an object", "json-invalid", lambda t: t[:40]),
        ("manifest-duplicate", "a field twice", "json-duplicate-key", twice),
        ("manifest-nan", "NaN as a seed", "json-number", spelled('"seed":0', '"seed":NaN')),
        ("manifest-1e999", "a seed of 1e999", "json-number", spelled('"seed":0', '"seed":1e999')),
        ("manifest-deep", "33 arrays in an object", "json-too-deep", spelled("{", DEEP)),
        ("manifest-escape", "a terminal escape", "json-string", spelled("tiny", "\\u001b[2J")),
        ("manifest-surrogate", "half a character", "json-string", spelled("tiny", "\\ud800")),
    ]
    for name, reason, code, change in texts:
        yield name, f"the manifest holds {reason}", code, manifest_text(change)
    for name, path, value, code in BAD_FIELDS:
        yield name, f"{path} is {json.dumps(value)}", code, manifest_with(path, value)
    for name, path, value, code in BAD_RECORDS:
        yield name, f"{path} is {json.dumps(value)}", code, manifest_with(path, value, recorded)
    for name, path, value, code in BAD_TOLD:
        said = json.dumps(value)
        said = said if len(said) < 80 else f"{said[:40]} …, {len(said)} characters"
        yield name, f"{path} is {said}", code, manifest_with(path, value, told)
    for path in ("kind", "model.rope", "tools.amkv", "queries", "stored"):
        name = "no-" + path.replace(".", "-")
        yield name, f"{path} is absent", "field-missing", manifest_without(path)
    it = recorded()
    it.manifest["payload_hash"], it.seal = payload_hash(it.tensors), False
    yield "no-manifest-hash", "manifest_hash is absent, in version 1.3", "field-missing", it
    it = recorded()
    it.file()
    it.manifest["manifest_hash"], it.seal = "sha256:" + "0" * 63, False
    yield "manifest-hash-short", "manifest_hash is one digit short", "field-value", it
    yield (
        "prefill-not-dense",
        "a prefill that lacks tokens",
        "field-conflict",
        manifest_with("stored", [[6, 5], [3]], prefill),
    )


def bad_contents() -> Iterator[tuple[str, str, str, Example | bytes]]:
    """Manifest and tensors that do not fit."""
    it = compact()
    del it.tensors["layers.1.values"]
    yield "tensor-missing", "a layer without values", "tensor-missing", it
    yield (
        "tensor-unknown",
        "a tensor of no meaning",
        "tensor-unexpected",
        tensor_with("layers.2.keys", "F32", [0, 4], b""),
    )
    it = tensor_with("layers.1.beta", "F32", [3], b"\0" * 12)
    yield "beta-on-sliding", "a beta on a sliding layer", "tensor-unexpected", it
    it = prefill()
    it.tensors["layers.0.beta"] = ("F32", [12], b"\0" * 48)
    yield "beta-on-prefill", "a beta in a prefill", "tensor-unexpected", it
    it = tensor_with("layers.0.beta", "F16", [4], b"\0" * 8)
    yield "beta-f16", "a beta of two bytes", "tensor-mismatch", it
    it = tensor_with("layers.1.keys", "F16", [3, 4], b"\0" * 24)
    yield "dtype-mixed", "keys of two dtypes", "tensor-mismatch", it
    it = example("compact", [[0, 0]], [FULL])
    yield "nothing-stored", "a compact file without an entry", "ratio-mismatch", it


def bad_verify() -> Iterator[tuple[str, str, str, Example | bytes]]:
    """Files that open; only `verify` finds what is wrong."""
    yield (
        "hash-wrong",
        "another payload hash",
        "payload-hash",
        manifest_with("payload_hash", "sha256:" + "0" * 64),
    )
    it = recorded()
    it.file()  # seals it
    it.manifest["boundary"], it.seal = "turn_closed", False
    yield "manifest-changed", "another boundary than was hashed", "manifest-hash", it
    it = recorded()
    it.file()
    it.manifest["version"], it.seal = "1.2", False
    yield "manifest-older", "a later version passed off as an earlier one", "manifest-hash", it
    flipped = bytearray(compact().file())
    flipped[-2] ^= 1
    yield "bit-flip", "one bit of a value", "payload-hash", bytes(flipped)
    yield (
        "not-canonical",
        "a space in the manifest",
        "manifest-not-canonical",
        manifest_text(spelled('"seed":0', '"seed": 0')),
    )
    yield (
        "token-negative",
        "a token id of -1",
        "token-id",
        tensor_with("token_ids", "I32", [6], struct.pack("<6i", 1, 2, -1, 3, 4, 5)),
    )
    yield (
        "position-past-end",
        "a position of T",
        "position",
        tensor_with("layers.0.positions", "I32", [4], struct.pack("<4i", -1, 0, 6, 5)),
    )
    yield (
        "position-minus-2",
        "a position of -2",
        "position",
        tensor_with("layers.0.positions", "I32", [4], struct.pack("<4i", -1, 0, -2, 5)),
    )
    for name, value in (("beta-nan", "nan"), ("beta-infinite", "-inf")):
        data = struct.pack("<4f", 0, 0, 0, float(value))
        yield (
            name,
            f"a beta of {value}",
            "not-finite",
            tensor_with("layers.0.beta", "F32", [4], data),
        )
    it = compact(dtype="BF16")
    it.tensors["layers.0.keys"] = ("BF16", [4, 4], b"\0" * 30 + b"\xc0\x7f")
    yield "key-nan", "a NaN among two-byte keys", "not-finite", it
