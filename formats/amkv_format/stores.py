"""The ways to store entries: their names, the features they require, and the tensors they take.

`native` stores numbers, every other store codes. A packed store is named `k{K}v{V}`: keys of K bits
a number, in groups of entries with a scale and a zero for each column, and values of V bits, in
blocks along the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

NATIVE: Final = "native"
MIXED: Final = "mixed"
"""What `store` says where layers differ: `stores` then has a name for each."""

BITS: Final = (8, 4, 3, 2)
"""Bits that a code of a packed store may have."""

PACKED: Final[Mapping[str, tuple[int, int]]] = {f"k{k}v{v}": (k, v) for k in BITS for v in BITS}
"""The packed stores, with the bits of a key's and of a value's code."""

STORE_PACKED: Final = "store-packed"
STORE_MIXED: Final = "store-mixed"

STORES: Final[Mapping[str, str | None]] = {
    NATIVE: None,
    "int8": "store-int8",
    "int4": "store-int4",
    **dict.fromkeys(PACKED, STORE_PACKED),
}
"""How the entries of a layer may be stored, each with the feature that it requires."""

GROUP: Final = 64
"""Most entries of one head whose keys share scales and zeros in a packed store."""

BLOCK: Final = 32
PACKED_BLOCK: Final = 64
"""Most numbers of a row that share a scale: in `int8` and `int4`, and for packed values."""

_MULTIPLE: Final[Mapping[int, int]] = {8: 1, 4: 2, 3: 8, 2: 4}
"""Numbers of a row are a multiple of this, so that every plane of such codes ends on a byte."""

Stored = tuple[str, str, tuple[int, ...]]
"""A tensor: what follows the name of its matrix, its dtype, its shape."""


def code_bits(store: str, part: str) -> int:
    """The bits of a code of `part`, which is `keys` or `values`, in a store of codes."""
    if store in PACKED:
        return PACKED[store][part == "values"]
    return {"int8": 8, "int4": 4}[store]


def row_multiple(store: str, part: str) -> int:
    """What the numbers in a row of `part` have to be a multiple of."""
    return 1 if store == NATIVE else _MULTIPLE[code_bits(store, part)]


def code_tensors(store: str, part: str, dim: int, heads: Sequence[int]) -> Iterator[Stored]:
    """The tensors of `part` in a store of codes: rows of `dim` numbers, `heads[h]` in head `h`."""
    rows = sum(heads)
    dtype = "I8" if store == "int8" else "U8"
    yield "", dtype, (rows, dim * code_bits(store, part) // 8)
    if store in PACKED and part == "keys":
        yield ".scale", "F16", (groups(heads), dim)
        yield ".zero", "F16", (groups(heads), dim)
    else:
        most = PACKED_BLOCK if store in PACKED else BLOCK
        yield ".scale", "F16", (rows, dim // block(dim, most))


def groups(heads: Sequence[int]) -> int:
    """Groups of at most GROUP entries, none of them across two heads."""
    return sum(-(-t // GROUP) for t in heads)


def block(dim: int, most: int) -> int:
    """How many numbers of a row of `dim` share a scale: the largest divisor up to `most`."""
    return next(b for b in range(min(dim, most), 0, -1) if dim % b == 0)
