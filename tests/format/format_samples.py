"""Small valid files for the format's tests, and hypothesis strategies that make more of them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from amkv_format import TensorSpec, Writer, layer_tensor
from hypothesis import strategies as st

VECTORS = Path(__file__).resolve().parents[2] / "formats" / "vectors"

Tensors = list[tuple[TensorSpec, bytes]]


def layer(
    kind: str = "full", heads: int = 2, key_dim: int = 4, value_dim: int = 2
) -> dict[str, Any]:
    return {
        "type": kind,
        "kv_heads": heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "window": None if kind == "full" else 4,
    }


def manifest(
    kind: str, length: int, layers: list[dict[str, Any]], stored: list[list[int]]
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "kind": kind,
        "model": {
            "id": "example/tiny",
            "revision": "0123abcd",
            "architecture": "qwen3",
            "config_hash": "sha256:" + "a" * 64,
            "dtype": "bfloat16",
            "layers": layers,
            "rope": {"rope_type": "default", "theta": 1e6, "factors": [1, 2.5]},
        },
        "tokenizer": {"hash": "sha256:" + "b" * 64, "template_hash": None},
        "source": {"name": "doc.txt", "sha256": "c" * 64, "characters": 10, "bytes": 12},
        "logical_length": length,
        "document_start": 0,
        "document_end": length,
        "boundary": "raw",
        "stored": stored,
        "tools": {"amkv": "0.1.0"},
    }
    if kind == "compact":
        result |= {
            "method": {"name": "omp"},
            "budget": {"name": "adaptive"},
            "requested": {"tokens": 3},
            "seed": 7,
            "queries": {"source": "repeat", "count": 100},
        }
    return result


def tensors(
    kind: str,
    length: int,
    layers: list[dict[str, Any]],
    stored: list[list[int]],
    dtype: str = "BF16",
    extras: bool = True,
) -> Tensors:
    """Every tensor the manifest calls for; with `extras` also beta and positions."""
    size = 4 if dtype == "F32" else 2
    result = [
        (TensorSpec("token_ids", "I32", (length,)), struct.pack(f"<{length}i", *range(length)))
    ]
    for i, (spec, counts) in enumerate(zip(layers, stored, strict=True)):
        rows = sum(counts)
        for part in ("key", "value"):
            dim = spec[f"{part}_dim"]
            shape = (rows, dim)
            data = bytes((i + 3 * j) % 100 // 2 for j in range(rows * dim * size))
            result.append((TensorSpec(layer_tensor(i, part + "s"), dtype, shape), data))
        if extras and kind == "compact" and spec["type"] == "full":
            data = struct.pack(f"<{rows}f", *((j % 9 - 4) / 2 for j in range(rows)))
            result.append((TensorSpec(layer_tensor(i, "beta"), "F32", (rows,)), data))
            data = struct.pack(f"<{rows}i", *(j % (length + 1) - 1 for j in range(rows)))
            result.append((TensorSpec(layer_tensor(i, "positions"), "I32", (rows,)), data))
    return result


def sample(kind: str = "compact", dtype: str = "BF16") -> tuple[dict[str, Any], Tensors]:
    """Two full layers and a sliding one, 8 tokens."""
    layers = [layer(), layer("sliding"), layer(heads=1)]
    stored = [[1, 3], [3, 3], [2]] if kind == "compact" else [[8, 8], [3, 3], [8]]
    return manifest(kind, 8, layers, stored), tensors(kind, 8, layers, stored, dtype)


def fill(writer: Writer, contents: Tensors) -> None:
    for spec, data in contents:
        writer.write(spec.name, data)


@st.composite
def samples(draw: st.DrawFn) -> tuple[dict[str, Any], Tensors]:
    """A random valid manifest with its tensors: ragged, empty heads, any dims and dtype."""
    kind = draw(st.sampled_from(("prefill", "compact")))
    length = draw(st.integers(1, 9))
    layers, stored = [], []
    for _ in range(draw(st.integers(1, 3))):
        dims = [draw(st.integers(1, 5)) for _ in range(3)]
        sliding = draw(st.booleans())
        layers.append(layer("sliding" if sliding else "full", *dims))
        if sliding:
            stored.append([draw(st.integers(min(length, 3), min(length, 4)))] * dims[0])
        elif kind == "prefill":
            stored.append([length] * dims[0])
        else:
            stored.append([draw(st.integers(0, length)) for _ in range(dims[0])])
    full = [sum(t) for t, spec in zip(stored, layers, strict=True) if spec["type"] == "full"]
    if full and not any(full):
        stored[[spec["type"] for spec in layers].index("full")][0] = 1
    dtype = draw(st.sampled_from(("F32", "BF16", "F16")))
    described = manifest(kind, length, layers, stored)
    printable = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\")
    described["x_extra"] = draw(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63) + 1, 2**63 - 1)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(printable, max_size=9),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(printable, max_size=5), inner, max_size=3)
            ),
            max_leaves=8,
        )
    )
    described["source"]["name"] = draw(
        st.text(printable, min_size=1, max_size=20).filter(lambda name: name not in (".", ".."))
    )
    return described, tensors(kind, length, layers, stored, dtype, draw(st.booleans()))
