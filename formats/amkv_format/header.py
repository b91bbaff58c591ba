"""The safetensors header: eight bytes of length, then JSON that says where the tensors lie.

Knows safetensors, nothing of manifests. What it returns has been checked: all tensors lie inside
the file, do not overlap, leave no gaps, and are aligned to their element size.
Layout: https://github.com/huggingface/safetensors#format; this reader is stricter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from amkv_format import limits
from amkv_format.errors import Code, FormatError, located
from amkv_format.jsontext import canonical_json, parse_json

ITEM_BYTES: Final[Mapping[str, int]] = {
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I8": 1,
    "U8": 1,
}
"""The dtypes that the format uses, and the bytes of one element."""

# Words joined by single dots or dashes: no path separator, no `..`, nothing hidden, ASCII only.
_NAME: Final = re.compile(r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*")
_METADATA: Final = "__metadata__"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before it has a place: `dtype` is a key of ITEM_BYTES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor: the product of its dimensions times its element size."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor of a file; `offset` counts bytes from the start of the file."""

    offset: int


@dataclass(frozen=True)
class Header:
    """A checked header: its metadata, its tensors in file order.

    metadata_offset, payload_offset  where each begins in the file
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    metadata_offset: int
    payload_offset: int


def check_spec(spec: TensorSpec) -> None:
    """Raises FormatError when a name, dtype or shape is not one that the format allows."""
    name, shape = spec.name, spec.shape
    if len(name) > limits.MAX_NAME_CHARS or not _NAME.fullmatch(name) or name == _METADATA:
        raise FormatError(Code.TENSOR_NAME, f"the tensor name {name[:80]!r} is not allowed")
    if spec.dtype not in ITEM_BYTES:
        raise FormatError(Code.TENSOR_DTYPE, f"{name} has the dtype {spec.dtype[:40]!r}")
    if not 1 <= len(shape) <= limits.MAX_RANK:
        raise FormatError(Code.TENSOR_SHAPE, f"{name} has {len(shape)} dimensions")
    if not all(_is_int(n) and 0 <= n <= limits.MAX_DIMENSION for n in shape):
        raise FormatError(Code.TENSOR_SHAPE, f"{name} has the shape {str(list(shape))[:80]}")


def header_length(prefix: bytes, file_bytes: int) -> int:
    """The header length in a file's first eight bytes, checked against the limit and the file."""
    if len(prefix) < 8:
        raise FormatError(Code.TOO_SHORT, f"the file has {file_bytes} bytes", 0)
    length = int.from_bytes(prefix[:8], "little")
    if length > limits.MAX_HEADER_BYTES:
        raise FormatError(
            Code.HEADER_TOO_LARGE,
            f"the header says {length} bytes, more than {limits.MAX_HEADER_BYTES}",
            0,
        )
    if 8 + length > file_bytes:
        raise FormatError(
            Code.HEADER_TRUNCATED, f"the header says {length} bytes, the file has {file_bytes}", 0
        )
    if length % 8:
        raise FormatError(Code.MISALIGNED, f"the header length {length} is no multiple of 8", 0)
    return length


def parse_header(raw: bytes, file_bytes: int) -> Header:
    """The header from its `raw` bytes (after the length) in a file of `file_bytes` bytes.

    Raises FormatError.
    """
    if not raw.startswith(b"{") or not raw.rstrip(b" ").endswith(b"}"):
        raise FormatError(Code.HEADER_FRAME, f"the header begins with {raw[:8]!r}", 8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(Code.HEADER_ENCODING, error.reason, 8 + error.start) from None
    entries = parse_json(text, origin=8)
    place = _place_of(_METADATA, raw)
    with located(place):
        metadata = _metadata(entries.pop(_METADATA, {}))
    if len(entries) > limits.MAX_TENSORS:
        raise FormatError(Code.TOO_MANY_TENSORS, f"{len(entries)} tensors", 8)
    start = 8 + len(raw)
    tensors = []
    for name, entry in entries.items():
        try:
            tensors.append(_tensor(name, entry, start, file_bytes))
        except FormatError as error:
            with located(_place_of(name, raw)):
                raise error
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _check_cover(tensors, start, file_bytes)
    return Header(metadata, {t.name: t for t in tensors}, place, start)


def build_header(tensors: Iterable[tuple[TensorSpec, int]], metadata: Mapping[str, str]) -> bytes:
    """A header, preceded by its length and padded with spaces to a multiple of 8 bytes.

    tensors  each with the offset of its first byte, counted from the start of the payload
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    for spec, begin in tensors:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
    return frame_header(canonical_json(entries).encode("utf-8"))


def frame_header(text: bytes, length: int = 0) -> bytes:
    """Header JSON padded to `length` bytes, or to the next multiple of 8, after its length."""
    length = max(length, -(-len(text) // 8) * 8)
    return length.to_bytes(8, "little") + text.ljust(length, b" ")


def _place_of(key: str, raw: bytes) -> int:
    """Where a key of the header is in the file; where the header begins if the key is escaped."""
    return 8 + max(0, raw.find(f'"{key}"'.encode("utf-8", "surrogatepass")))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(Code.HEADER_SCHEMA, "__metadata__ is not an object of strings")
    return value


def _tensor(name: str, entry: object, start: int, file_bytes: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            Code.HEADER_SCHEMA, f"the entry {name[:80]!r} is not {{dtype, shape, data_offsets}}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise FormatError(Code.HEADER_SCHEMA, f"the entry {name[:80]!r} has a field of wrong type")
    if len(offsets) != 2 or not all(_is_int(n) and n >= 0 for n in offsets):
        raise FormatError(Code.HEADER_SCHEMA, f"{name[:80]!r} has the offsets {str(offsets)[:80]}")
    begin, end = offsets
    info = TensorInfo(name, dtype, tuple(shape), start + begin)
    check_spec(info)
    if end - begin != info.nbytes:
        raise FormatError(
            Code.TENSOR_SIZE,
            f"{name} has {end - begin} bytes, but {dtype} {shape} takes {info.nbytes}",
        )
    if start + end > file_bytes:
        raise FormatError(
            Code.PAYLOAD_TRUNCATED,
            f"{name} ends at byte {start + end}, the file at {file_bytes}",
            file_bytes,
        )
    if begin % ITEM_BYTES[dtype]:
        raise FormatError(Code.MISALIGNED, f"{name} starts between two elements", start + begin)
    return info


def _check_cover(tensors: list[TensorInfo], start: int, file_bytes: int) -> None:
    """The tensors, in order of their offsets, have to cover the payload exactly."""
    cursor = start
    for info in tensors:
        if info.offset > cursor:
            raise FormatError(
                Code.PAYLOAD_GAP, f"{info.offset - cursor} bytes before {info.name}", cursor
            )
        if info.offset < cursor:
            raise FormatError(
                Code.PAYLOAD_OVERLAP, f"{info.name} starts inside another tensor", info.offset
            )
        cursor += info.nbytes
    if cursor != file_bytes:
        raise FormatError(
            Code.PAYLOAD_TRAILING, f"{file_bytes - cursor} bytes after the last tensor", cursor
        )
