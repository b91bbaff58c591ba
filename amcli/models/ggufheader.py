"""The header of a GGUF file: metadata, and where each tensor is.

The reader in the package `gguf` makes an array for every token, which takes seconds with today's
vocabularies. This one skips what nobody needs, and reports a file that is cut off.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from amcli.errors import UsageError

MAGIC = b"GGUF"

_VERSIONS = (2, 3)
_ALIGNMENT = 32

# By the format's type numbers: bytes, shorts, ints, floats, booleans, longs.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9

_KEPT = ("tokenizer.ggml.tokens",)

_AGAIN = "download the file again"


class Tensor(NamedTuple):
    """A tensor of a file; its first dimension is the contiguous one.

    kind   how its numbers are packed, as ggml's type number
    block  numbers per block, and bytes per block
    start  where it begins in the file
    """

    name: str
    dims: tuple[int, ...]
    kind: int
    block: tuple[int, int]
    start: int
    size: int

    def entry(self, place: int) -> bytes:
        """Its entry in the table of a file where it begins at `place` after the header."""
        name = self.name.encode()
        return b"".join(
            (
                integer("Q", len(name)),
                name,
                integer("I", len(self.dims)),
                *(integer("Q", n) for n in self.dims),
                integer("I", self.kind),
                integer("Q", place),
            )
        )


@dataclass(frozen=True)
class Header:
    """A file's header; `fields` is where its `field_count` metadata fields lie."""

    version: int
    metadata: dict[str, Any]
    fields: tuple[int, int]
    field_count: int
    tensors: tuple[Tensor, ...]
    alignment: int


def integer(code: str, value: int) -> bytes:
    """An integer as the format writes it: little-endian."""
    return struct.pack("<" + code, value)


def read_header(path: Path) -> Header:
    """The header of a file; raises UsageError for a file that is not GGUF, or is cut off."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UsageError(
                f"{path} is not a GGUF file: it does not begin as one",
                _AGAIN,
                code="gguf-damaged",
                field="model",
                path=path,
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data, path).header()
            except (struct.error, IndexError, UnicodeDecodeError, _DamageError) as error:
                raise UsageError(
                    f"the GGUF file {path} is damaged or cut off",
                    f"{_AGAIN}, and all of it",
                    code="gguf-damaged",
                    field="model",
                    path=path,
                ) from error


_Entry = tuple[str, tuple[int, ...], int, int]
"""Name, dimensions, kind and place of a tensor, as in the table."""


class _DamageError(Exception):
    """Something that no valid GGUF file contains."""


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.at = len(MAGIC)

    def header(self) -> Header:
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0
            raise UsageError(
                f"{self.path} is a GGUF file "
                + ("with the big end first" if swapped else f"of version {version}")
                + ", which transformers does not read",
                "choose one for common machines, of version 2 or 3",
                code="gguf-version",
                field="model",
                path=self.path,
                version=version,
            )
        tensor_count, field_count = self._number("Q"), self._number("Q")
        begin, metadata = self.at, {}
        for _ in range(field_count):
            key = self._string()
            metadata[key] = self._value(self._number("I"), key in _KEPT)
        fields = (begin, self.at)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise _DamageError
        entries = [self._entry() for _ in range(tensor_count)]
        start = -(-self.at // alignment) * alignment
        tensors = self._placed(entries, start)
        return Header(version, metadata, fields, field_count, tensors, alignment)

    def _entry(self) -> _Entry:
        name = self._string()
        dims = tuple(self._number("Q") for _ in range(self._number("I")))
        return name, dims, self._number("I"), self._number("Q")

    def _placed(self, entries: list[_Entry], start: int) -> tuple[Tensor, ...]:
        from gguf import GGML_QUANT_SIZES

        blocks = {int(kind): block for kind, block in GGML_QUANT_SIZES.items()}
        found = []
        for name, dims, kind, offset in entries:
            if kind not in blocks:
                raise UsageError(
                    f"{self.path} has tensors of type {kind}, which the package gguf does not know",
                    "pip install --upgrade gguf, or take a file of another type, such as Q4_K_M",
                    code="gguf-type-unknown",
                    field="model",
                    path=self.path,
                    type=kind,
                )
            size = math.prod(dims) // blocks[kind][0] * blocks[kind][1]
            if start + offset + size > len(self.data):
                raise _DamageError
            found.append(Tensor(name, dims, kind, blocks[kind], start + offset, size))
        return tuple(found)

    def _value(self, kind: int, keep: bool) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise _DamageError
        kind, count = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            self.at += count * struct.calcsize("<" + _SCALARS[kind])
            return None
        if keep:
            return [self._value(kind, keep) for _ in range(count)]
        for _ in range(count):
            if kind == _STRING:
                length = self._number("Q")
                self.at += length
            else:
                self._value(kind, keep)
        return None

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._number("Q")
        if self.at + length > len(self.data):
            raise _DamageError
        text = self.data[self.at : self.at + length].decode()
        self.at += length
        return text
