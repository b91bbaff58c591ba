"""Small valid files for the format's tests. Child processes import it, so it imports little."""

from __future__ import annotations

import struct
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amkv_format import TensorSpec, Writer, layer_tensor

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
    store: str | Sequence[str] = "native",
) -> Tensors:
    """Every tensor the manifest calls for; with `extras` also beta and positions.

    store  that of all full layers, or one for each layer
    """
    size = 4 if dtype == "F32" else 2
    result = [
        (TensorSpec("token_ids", "I32", (length,)), struct.pack(f"<{length}i", *range(length)))
    ]
    for i, (spec, counts) in enumerate(zip(layers, stored, strict=True)):
        rows = sum(counts)
        own = store if spec["type"] == "full" else "native"
        if not isinstance(store, str):
            own = store[i]
        for part in ("key", "value"):
            dim = spec[f"{part}_dim"]
            shape = (rows, dim)
            if own != "native":
                result += codes(layer_tensor(i, part + "s"), counts, dim, str(own))
                continue
            data = bytes((i + 3 * j) % 100 // 2 for j in range(rows * dim * size))
            result.append((TensorSpec(layer_tensor(i, part + "s"), dtype, shape), data))
        if extras and kind == "compact" and spec["type"] == "full":
            data = struct.pack(f"<{rows}f", *((j % 9 - 4) / 2 for j in range(rows)))
            result.append((TensorSpec(layer_tensor(i, "beta"), "F32", (rows,)), data))
            data = struct.pack(f"<{rows}i", *(j % (length + 1) - 1 for j in range(rows)))
            result.append((TensorSpec(layer_tensor(i, "positions"), "I32", (rows,)), data))
    return result


def codes(name: str, counts: Sequence[int], dim: int, store: str) -> Tensors:
    """Keys or values as codes, and what belongs to them; head dimensions up to 32."""
    rows = sum(counts)
    if store.startswith("k"):
        bits = int(store[1] if name.endswith("keys") else store[3])
        kind, width = "U8", dim * bits // 8
    else:
        kind, width = ("I8", dim) if store == "int8" else ("U8", dim // 2)
    data = bytes(0x11 + (37 * j) % 15 for j in range(rows * width))
    result = [(TensorSpec(name, kind, (rows, width)), data)]
    shape = (rows, 1)
    if store.startswith("k") and name.endswith("keys"):
        shape = (sum(-(-t // 64) for t in counts), dim)
        result.append((TensorSpec(f"{name}.zero", "F16", shape), halves(shape, -2)))
    return [*result, (TensorSpec(f"{name}.scale", "F16", shape), halves(shape, 0))]


def halves(shape: tuple[int, int], low: int) -> bytes:
    """F16 numbers from `low / 4` on."""
    count = shape[0] * shape[1]
    return struct.pack(f"<{count}e", *((low + j % 5) / 4 for j in range(count)))


def sample(kind: str = "compact", dtype: str = "BF16") -> tuple[dict[str, Any], Tensors]:
    """Two full layers and a sliding one, 8 tokens."""
    layers = [layer(), layer("sliding"), layer(heads=1)]
    stored = [[1, 3], [3, 3], [2]] if kind == "compact" else [[8, 8], [3, 3], [8]]
    return manifest(kind, 8, layers, stored), tensors(kind, 8, layers, stored, dtype)


def fill(writer: Writer, contents: Tensors) -> None:
    for spec, data in contents:
        writer.write(spec.name, data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(script: str, *arguments: Path, status: int = 0) -> None:
    """Runs Python code in a process of its own; it gets the arguments, then this `sys.path`."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments), *sys.path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr
