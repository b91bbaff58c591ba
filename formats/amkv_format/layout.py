"""Which tensors a manifest calls for, and what the stored bytes amount to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from amkv_format import limits
from amkv_format.errors import Code, FormatError
from amkv_format.header import ITEM_BYTES, TensorInfo, TensorSpec
from amkv_format.manifest import Layer, Outline
from amkv_format.stores import NATIVE, code_tensors

TOKEN_IDS: Final = "token_ids"
STORAGE_DTYPES: Final = ("F32", "BF16", "F16")
PARTS: Final = (
    "keys", "keys.scale", "keys.zero", "values", "values.scale", "beta", "positions",
)  # fmt: skip
"""The parts of a layer, one tensor each."""

STATE: Final = "states."
"""Tensors under this prefix are the states of layers that keep one; a number follows."""

EXTENSION: Final = "ext."
"""Tensors under this prefix are hashed but otherwise ignored."""


@dataclass(frozen=True)
class _Wanted:
    shape: tuple[int, ...] | None  # None: any
    dtypes: tuple[str, ...]
    required: bool


def layer_tensor(layer: int, part: str) -> str:
    """The name of a layer's tensor; `part` is one of PARTS."""
    return f"layers.{layer}.{part}"


def state_tensor(n: int) -> str:
    """The name of the tensor of the `n`-th of the manifest's states."""
    return f"{STATE}{n}"


def check_tensors(outline: Outline, tensors: Mapping[str, TensorSpec]) -> None:
    """Compares the tensors of a file with its manifest.

    Raises FormatError: `tensor-missing`, `tensor-mismatch`, `tensor-unexpected`, or
    `ratio-mismatch`.
    """
    wanted = dict(_wanted(outline))
    for name, want in wanted.items():
        info = tensors.get(name)
        if info is not None:
            _compare(info, want)
        elif want.required:
            raise FormatError(Code.TENSOR_MISSING, f"{name} is absent")
    for name in tensors:
        if name not in wanted and not name.startswith(EXTENSION):
            raise FormatError(Code.TENSOR_UNEXPECTED, f"{name} is not part of this {outline.kind}")
    _check_one_dtype(outline, tensors)
    if outline.ratio is not None:
        _check_ratio(outline.ratio, compaction_ratio(outline, tensors))


def compaction_ratio(outline: Outline, tensors: Mapping[str, TensorSpec]) -> float:
    """Full KV bytes of the full-attention layers over the bytes stored for them.

    Full bytes are in the file's storage dtype, or in the model's where entries are codes; stored
    bytes are all tensors of these layers. 1.0 when the model has no full-attention layer. Raises
    FormatError (ratio-mismatch) when nothing at all is stored.
    """
    full = stored = 0
    for i, layer in enumerate(outline.layers):
        if layer.type != "full":
            continue
        full += full_bytes(outline, tensors, i)
        for part in PARTS:
            if info := tensors.get(layer_tensor(i, part)):
                stored += info.nbytes
    if full and not stored:
        raise FormatError(Code.RATIO, "no entry is stored for any full-attention layer")
    return full / stored if full else 1.0


def full_bytes(outline: Outline, tensors: Mapping[str, TensorSpec], index: int) -> int:
    """Bytes of a layer's keys and values before compaction; for a sliding layer, of its tail."""
    layer = outline.layers[index]
    rows = layer.rows if layer.window else outline.logical_length * layer.kv_heads
    size = ITEM_BYTES[tensors[layer_tensor(index, "keys")].dtype]
    if layer.store != NATIVE:
        size = outline.model_bytes
    return rows * (layer.key_dim + layer.value_dim) * size


def payload_hash(tensors: Mapping[str, TensorSpec], digests: Mapping[str, str]) -> str:
    """`sha256:` and the hash of one line per tensor, `name dtype [shape] digest`, sorted by name.

    digests  SHA-256 of each tensor's bytes, 64 lowercase hexadecimal digits
    """
    lines = hashlib.sha256()
    for name in sorted(tensors):
        shape = ",".join(map(str, tensors[name].shape))
        lines.update(f"{name} {tensors[name].dtype} [{shape}] {digests[name]}\n".encode())
    return "sha256:" + lines.hexdigest()


def _wanted(outline: Outline) -> Iterator[tuple[str, _Wanted]]:
    yield TOKEN_IDS, _Wanted((outline.logical_length,), ("I32",), True)
    for i, layer in enumerate(outline.layers):
        yield from _wanted_of_layer(i, layer, outline)
    for n in range(outline.states):
        yield state_tensor(n), _Wanted(None, STORAGE_DTYPES, True)


def _wanted_of_layer(i: int, layer: Layer, outline: Outline) -> Iterator[tuple[str, _Wanted]]:
    rows = layer.rows
    for part, dim in (("keys", layer.key_dim), ("values", layer.value_dim)):
        name = layer_tensor(i, part)
        if layer.store == NATIVE:
            yield name, _Wanted((rows, dim), STORAGE_DTYPES, True)
            continue
        for suffix, dtype, shape in code_tensors(layer.store, part, dim, layer.stored):
            yield f"{name}{suffix}", _Wanted(shape, (dtype,), True)
    if outline.kind == "compact" and layer.type == "full":
        yield layer_tensor(i, "beta"), _Wanted((rows,), ("F32",), False)
        yield layer_tensor(i, "positions"), _Wanted((rows,), ("I32",), False)


def _compare(info: TensorSpec, want: _Wanted) -> None:
    place = info.offset if isinstance(info, TensorInfo) else None
    if info.dtype not in want.dtypes:
        raise FormatError(
            Code.TENSOR_MISMATCH,
            f"{info.name} is {info.dtype}, not {' or '.join(want.dtypes)}",
            place,
        )
    if want.shape is not None and info.shape != want.shape:
        raise FormatError(
            Code.TENSOR_MISMATCH,
            f"{info.name} has the shape {list(info.shape)}, the manifest says {list(want.shape)}",
            place,
        )


def _check_one_dtype(outline: Outline, tensors: Mapping[str, TensorSpec]) -> None:
    dtypes = {
        tensors[layer_tensor(i, part)].dtype
        for i, layer in enumerate(outline.layers)
        for part in ("keys", "values")
        if layer.store == NATIVE
    }
    if len(dtypes) > 1:
        raise FormatError(
            Code.TENSOR_MISMATCH, f"keys and values mix the dtypes {', '.join(sorted(dtypes))}"
        )


def _check_ratio(stated: float, found: float) -> None:
    if abs(stated - found) > limits.RATIO_TOLERANCE * found:
        raise FormatError(Code.RATIO, f"ratio is {stated}, the stored tensors give {found:.4g}")
