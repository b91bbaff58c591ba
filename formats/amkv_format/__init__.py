"""Reader, writer and validator of `.amkv` files, version 1.4. Standard library only.

    with AmkvFile.open("doc.amkv") as file:
        file.verify()
        keys = file.read("layers.0.keys")

The format is specified in `amkv-v1.md`. This package never trusts a byte of a file: whatever is in
it, the result is a valid `AmkvFile` or a `FormatError`.
"""

from __future__ import annotations

from amkv_format.errors import Code, FormatError
from amkv_format.header import ITEM_BYTES, TensorInfo, TensorSpec
from amkv_format.jsontext import canonical_json
from amkv_format.layout import EXTENSION, TOKEN_IDS, layer_tensor, state_tensor
from amkv_format.manifest import (
    BOUNDARIES,
    FORMAT,
    KINDS,
    MODEL_DTYPES,
    VERSION,
    Layer,
    manifest_schema,
)
from amkv_format.reader import AmkvFile
from amkv_format.stores import GROUP, MIXED, PACKED, STORES
from amkv_format.weights import Comparison, compare_weights, same_weight
from amkv_format.writer import Writer, write_file

__all__ = [
    "BOUNDARIES",
    "EXTENSION",
    "FORMAT",
    "GROUP",
    "ITEM_BYTES",
    "KINDS",
    "MIXED",
    "MODEL_DTYPES",
    "PACKED",
    "STORES",
    "TOKEN_IDS",
    "VERSION",
    "AmkvFile",
    "Code",
    "Comparison",
    "FormatError",
    "Layer",
    "TensorInfo",
    "TensorSpec",
    "Writer",
    "canonical_json",
    "compare_weights",
    "layer_tensor",
    "manifest_schema",
    "same_weight",
    "state_tensor",
    "write_file",
]
