"""Builds `.amkv` bytes by hand from the specification; no import of `amkv_format`, on purpose."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ITEM_BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}

Tensors = dict[str, tuple[str, list[int], bytes]]


@dataclass
class Example:
    """A file before it is bytes; bad examples change one thing and leave the rest right.

    tensors  name -> dtype, shape, bytes, in file order
    entries  changes to single fields of header entries: (name, field) -> value
    """

    manifest: dict[str, Any]
    tensors: Tensors
    entries: dict[tuple[str, str], Any] = field(default_factory=dict)
    manifest_text: str | None = None
    metadata: Any = None
    header_text: Callable[[str], str] = lambda text: text
    padding: int = 0
    tail: bytes = b""
    seal: bool = True

    def file(self) -> bytes:
        """The bytes of the file."""
        if self.seal:
            self.manifest["payload_hash"] = payload_hash(self.tensors)
            if hashed(self.manifest):
                self.manifest["manifest_hash"] = manifest_hash(self.manifest)
        text = canonical(self.manifest) if self.manifest_text is None else self.manifest_text
        header: dict[str, Any] = {"__metadata__": self.metadata or {"amkv": text}}
        cursor = 0
        for name, (dtype, shape, data) in self.tensors.items():
            end = cursor + len(data)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [cursor, end]}
            cursor = end
        for (name, key), value in self.entries.items():
            header[name][key] = value
        raw = self.header_text(canonical(header)).encode("utf-8", "surrogateescape")
        raw += b" " * (-len(raw) % 8 + self.padding)
        payload = b"".join(data for _, _, data in self.tensors.values())
        return struct.pack("<Q", len(raw)) + raw + payload + self.tail


def canonical(value: object) -> str:
    """Canonical JSON; NaN goes through, because a bad example needs it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def payload_hash(tensors: Tensors) -> str:
    """Section "Payload hash" of the specification."""
    lines = ""
    for name, (dtype, shape, data) in sorted(tensors.items()):
        dims = ",".join(str(n) for n in shape)
        lines += f"{name} {dtype} [{dims}] {hashlib.sha256(data).hexdigest()}\n"
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def hashed(manifest: dict[str, Any]) -> bool:
    """Whether the version asks for a hash of the manifest: 1.3 and later."""
    version = str(manifest["version"]).split(".")
    return version[0] == "1" and len(version) == 2 and int(version[1]) >= 3


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Section "Hashes" of the specification: of the manifest without the hash itself."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_hash"}
    return "sha256:" + hashlib.sha256(canonical(rest).encode()).hexdigest()


def floats(dtype: str, count: int, seed: int) -> bytes:
    """`count` small numbers that every dtype represents exactly."""
    values = [((seed + 7 * i) % 33 - 16) / 8 for i in range(count)]
    if dtype == "BF16":
        return b"".join(struct.pack("<f", v)[2:] for v in values)
    return struct.pack(f"<{count}{'f' if dtype == 'F32' else 'e'}", *values)


def layer(
    kind: str, heads: int, key_dim: int, value_dim: int, window: int | None
) -> dict[str, Any]:
    """A layer of `model.layers`."""
    return {
        "type": kind,
        "kv_heads": heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "window": window,
    }


def example(
    kind: str,
    stored: list[list[int]],
    layers: list[dict[str, Any]],
    T: int = 6,
    dtype: str = "F32",
    beta: bool = False,
    positions: bool = False,
) -> Example:
    """A right file; four-byte tensors first, so that all are aligned."""
    words: Tensors = {"token_ids": ("I32", [T], struct.pack(f"<{T}i", *range(100, 100 + T)))}
    halves: Tensors = {}
    full = kept = 0
    for i, (spec, counts) in enumerate(zip(layers, stored, strict=True)):
        rows = sum(counts)
        compacted = kind == "compact" and spec["type"] == "full"
        if beta and compacted:
            words[f"layers.{i}.beta"] = ("F32", [rows], floats("F32", rows, i))
        if positions and compacted:
            places = [j - 1 if j < T else -1 for j in range(rows)]
            words[f"layers.{i}.positions"] = ("I32", [rows], struct.pack(f"<{rows}i", *places))
        for part, dim in (("keys", spec["key_dim"]), ("values", spec["value_dim"])):
            data = floats(dtype, rows * dim, seed=i + dim)
            halves[f"layers.{i}.{part}"] = (dtype, [rows, dim], data)
        if spec["type"] == "full":
            width = (spec["key_dim"] + spec["value_dim"]) * ITEM_BYTES[dtype]
            full += T * spec["kv_heads"] * width
            kept += rows * (width + 4 * (beta + positions))
    manifest = base_manifest(kind, stored, layers, T)
    if kind == "compact":
        manifest["ratio"] = round(full / kept, 4) if kept else 1.0
    return Example(manifest, words | halves)


def aligned(tensors: Tensors) -> Tensors:
    """Tensors of the largest elements first, so that each begins where its elements may."""
    return dict(sorted(tensors.items(), key=lambda t: -ITEM_BYTES[t[1][0]]))


def base_manifest(
    kind: str, stored: list[list[int]], layers: list[dict[str, Any]], T: int
) -> dict[str, Any]:
    """Every required field, and the compact ones where they belong."""
    text = "The pet of Ada is a lynx."
    manifest: dict[str, Any] = {
        "format": "amkv",
        "version": "1.0",
        "features_required": [],
        "kind": kind,
        "created": "2026-01-31T12:00:00Z",
        "model": {
            "id": "example/tiny",
            "revision": None,
            "architecture": "llama",
            "config_hash": "sha256:" + "0" * 64,
            "dtype": "float32",
            "layers": copy.deepcopy(layers),
            "rope": {"rope_type": "default", "theta": 10000.0},
        },
        "tokenizer": {"hash": "sha256:" + "1" * 64, "template_hash": None},
        "source": {
            "name": "pets.txt",
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "characters": len(text),
            "bytes": len(text.encode()),
        },
        "logical_length": T,
        "document_start": 0,
        "document_end": T,
        "boundary": "raw",
        "stored": copy.deepcopy(stored),
        "tools": {"amkv": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }
    if kind == "compact":
        manifest |= {
            "method": {"name": "omp", "chunk": 2048},
            "budget": {"name": "adaptive"},
            "requested": {"ratio": 2},
            "seed": 0,
            "queries": {"source": "repeat", "count": 12},
        }
    return manifest


FULL = layer("full", 2, 4, 2, None)
SLIDING = layer("sliding", 1, 4, 2, 4)


def prefill(**changes: Any) -> Example:
    """A full and a sliding layer, nothing compacted."""
    return example("prefill", [[6, 6], [3]], [FULL, SLIDING], **changes)


def compact(**changes: Any) -> Example:
    """The same model, ragged heads of 1 and 3 entries with beta and positions."""
    return example(
        "compact", [[1, 3], [3]], [FULL, SLIDING], **{"beta": True, "positions": True} | changes
    )


def recorded() -> Example:
    """`compact` as amkv writes it: version 1.3, with all that it records beside what it must."""
    it = compact()
    it.manifest |= {
        "version": "1.3",
        "requested": {"ratio": 2.0, "fidelity": 0.99},
        "fit_errors": {"mass": [[0.125, 1e-07], []], "output": [[0.5, 0.25], []]},
        "attention": [[0.75, 0.0625], []],
        "fidelity": {
            "asked": 0.99,
            "agreement": 0.9921875,
            "tokens": 256,
            "probes": [
                {"ratio": 2.0, "real_ratio": 2.4, "stored_bytes": 80, "agreement": 0.9921875}
            ],
        },
    }
    it.manifest["queries"] |= {"held_out": 4, "asked": 2, "temperature": 1.0}
    it.manifest["budget"] = {"name": "file", "file": "shares.json", "sha256": "3" * 64}
    return it


def told() -> Example:
    """A prefill of version 1.4 that says what its model is: configuration, weights, turns."""
    it = prefill()
    it.manifest["version"] = "1.4"
    it.manifest["model"] |= {
        "config": {"hidden_size": 8, "rope_parameters": {"rope_theta": 10000.0}, "window": None},
        "weights": {
            "model.embed_tokens.weight 16x8": "3f800000bf00000000000000",
            "model.layers.*.mlp.up_proj.weight 8x8": "3d4ccccd7fc00000",
        },
    }
    it.manifest["tokenizer"] |= {
        "template_hash": "sha256:" + "2" * 64,
        "turns_hash": "sha256:" + "4" * 64,
    }
    return it


def worked() -> Example:
    """The example that the specification takes apart: one layer, two heads, three entries."""
    it = example("compact", [[1, 2]], [layer("full", 2, 2, 2, None)], T=3, beta=True)
    numbers = {
        "layers.0.beta": [0, -0.5, 0.25],
        "layers.0.keys": [1, 0, 0, 1, 0.5, -1],
        "layers.0.values": [2, 3, -1, 4, 0.25, 0],
    }
    for name, values in numbers.items():
        dtype, shape, _ = it.tensors[name]
        it.tensors[name] = (dtype, shape, struct.pack(f"<{len(values)}f", *values))
    it.tensors["token_ids"] = ("I32", [3], struct.pack("<3i", 7, 8, 9))
    it.manifest |= {"version": "1.3", "method": {"name": "omp"}}
    it.manifest["queries"] = {"source": "repeat", "count": 12}
    return it


def hybrid(**changes: Any) -> Example:
    """`compact`, and between its layers one with two states and one with a state of one number."""
    it = compact(**changes)
    kept = (
        (1, "conv", "F16", [1, 4, 3], 12),
        (1, "recurrent", "F32", [1, 2, 4, 2], 16),
        (3, "recurrent", "F32", [1], 1),
    )
    states = [{"layer": layer, "name": name} for layer, name, *_ in kept]
    it.manifest |= {"version": "1.2", "states": states, "features_required": ["states"]}
    for n, (_, _, dtype, shape, count) in enumerate(kept):
        it.tensors[f"states.{n}"] = (dtype, shape, floats(dtype, count, seed=n))
    it.tensors = aligned(it.tensors)
    return it


def coded(store: str, kv: dict[str, Any] | None = None, **changes: Any) -> Example:
    """`compact`, but with entries of the full layer as codes; the sliding layer is F16."""
    full = FULL if kv is None else kv
    it = example(
        "compact", [[1, 3], [3]], [full, SLIDING], **{"dtype": "F16", "beta": True} | changes
    )
    rows, nbytes = 4, 0
    for part in ("keys", "values"):
        del it.tensors[f"layers.0.{part}"]
        made = integer_codes(f"layers.0.{part}", store, rows, full[f"{part[:-1]}_dim"])
        it.tensors |= made
        nbytes += sum(len(data) for _, _, data in made.values())
    it.tensors = aligned(it.tensors)
    it.manifest |= {"version": "1.1", "store": store, "features_required": [f"store-{store}"]}
    it.manifest["model"]["dtype"] = "float16"
    whole = 6 * full["kv_heads"] * (full["key_dim"] + full["value_dim"]) * 2
    it.manifest["ratio"] = round(whole / (nbytes + 4 * rows), 4)
    return it


def integer_codes(name: str, store: str, rows: int, dim: int) -> Tensors:
    """A matrix in the store `int8` or `int4`, and its scales."""
    b = max(n for n in range(1, min(dim, 32) + 1) if dim % n == 0)
    blocks = rows * dim // b
    scales = struct.pack(f"<{blocks}e", *((1 + i % 5) / 16 for i in range(blocks)))
    width = dim if store == "int8" else dim // 2
    low = [1 + (3 * i + dim) % 15 for i in range(rows * width)]
    high = [1 + (5 * i + 2) % 15 for i in range(rows * width)]
    if store == "int8":
        data = bytes((17 * i) % 255 - 127 & 255 for i in range(rows * width))
    else:
        data = bytes(a | b << 4 for a, b in zip(low, high, strict=True))
    codes = ("I8" if store == "int8" else "U8", [rows, width], data)
    return {f"{name}.scale": ("F16", [rows, dim // b], scales), name: codes}
