"""`AmkvFile`: an `.amkv` file, opened, checked, and mapped into memory.

Opening reads the header and nothing of the payload, so it takes milliseconds, whatever the size.
`verify` checks what depends on the payload's bytes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from array import array
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType, TracebackType
from typing import Any

from amkv_format import contents, limits
from amkv_format.errors import Code, FormatError, located
from amkv_format.header import ITEM_BYTES, Header, TensorInfo, header_length, parse_header
from amkv_format.jsontext import canonical_json, parse_json
from amkv_format.layout import (
    EXTENSION,
    STATE,
    TOKEN_IDS,
    check_tensors,
    compaction_ratio,
    full_bytes,
    layer_tensor,
    payload_hash,
)
from amkv_format.manifest import Layer, Outline, check_manifest, manifest_hash
from amkv_format.stores import NATIVE, PACKED

_HASH_CHUNK = 2**20


class AmkvFile:
    """A valid `.amkv` file, read-only. Make one with `AmkvFile.open`; it is a context manager.

    path      the path as given to `open`
    manifest  the manifest as parsed from JSON, with any unknown fields
    tensors   name -> TensorInfo (dtype, shape, nbytes, offset), in file order

    Views returned by `read` keep the mapping alive after `close`. They show the file: truncating
    it in place while it is mapped kills the process (SIGBUS), as with any mapping.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mapping: mmap.mmap,
        header: Header,
        manifest_text: str,
    ):
        self._text = manifest_text
        self._mapping: mmap.mmap | None = mapping
        self._metadata_offset = header.metadata_offset
        self._payload_offset = header.payload_offset
        self.path = path
        with located(header.metadata_offset):
            self.manifest: dict[str, Any] = parse_json(manifest_text)
            self._outline: Outline = check_manifest(self.manifest)
            check_tensors(self._outline, header.tensors)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(header.tensors))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> AmkvFile:
        """Opens and checks `path`: header, manifest, and that the two agree.

        Raises FormatError when the file is not valid, OSError when it cannot be read.
        """
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
        try:
            return cls.from_descriptor(descriptor, path)
        finally:
            os.close(descriptor)

    @classmethod
    def from_descriptor(cls, descriptor: int, path: str | os.PathLike[str]) -> AmkvFile:
        """Like `open`, for a file already open; the descriptor remains the caller's."""
        mapping, size = _map(descriptor)
        try:
            length = header_length(mapping[:8], size)
            header = parse_header(mapping[8 : 8 + length], size)
            with located(header.metadata_offset):
                text = _manifest_text(header)
            return cls(path, mapping, header, text)
        except BaseException:
            mapping.close()
            raise

    @property
    def kind(self) -> str:
        """`prefill` or `compact`."""
        return self._outline.kind

    @property
    def logical_length(self) -> int:
        """`T`: tokens of the context as the model saw them."""
        return self._outline.logical_length

    @property
    def layers(self) -> tuple[Layer, ...]:
        """One Layer per model layer: type, heads, dims, window, and entries stored per head."""
        return self._outline.layers

    @property
    def ratio(self) -> float:
        """Full KV bytes of the full-attention layers over the bytes stored for them."""
        return compaction_ratio(self._outline, self.tensors)

    @property
    def store(self) -> str:
        """How entries are stored: one store for all full layers (sliding ones are then `native`),
        or `mixed`, where `layers` say the store of each."""
        return self._outline.store

    @property
    def full_bytes(self) -> int:
        """Bytes before compaction: all keys and values, with tails of sliding layers and states as
        they are."""
        states = sum(x.nbytes for name, x in self.tensors.items() if name.startswith(STATE))
        layers = range(len(self.layers))
        return states + sum(full_bytes(self._outline, self.tensors, i) for i in layers)

    def read(self, name: str) -> memoryview:
        """The bytes of a tensor, little-endian, as a read-only view without a copy.

        Raises KeyError for a name that is not in `tensors`, ValueError once closed.
        """
        info = self.tensors[name]
        if self._mapping is None:
            raise ValueError("read of a closed AmkvFile")
        return memoryview(self._mapping)[info.offset : info.offset + info.nbytes]

    def token_ids(self) -> array[int]:
        """The `T` token ids; raises FormatError (token-id) when one is negative."""
        self._check_range(TOKEN_IDS, 0, limits.MAX_TOKENS, Code.TOKEN_ID)
        return contents.int32(self.read(TOKEN_IDS))

    def positions(self, layer: int) -> array[int] | None:
        """The index in `token_ids` that each entry of a layer was taken from, -1 for none; None if
        positions are not stored. Raises FormatError (position) for one out of range."""
        name = layer_tensor(layer, "positions")
        if name not in self.tensors:
            return None
        self._check_range(name, -1, self.logical_length - 1, Code.POSITION)
        return contents.int32(self.read(name))

    def check_beta(self) -> None:
        """Raises FormatError (not-finite) when a beta is NaN or infinite; cheap."""
        for name in self._named("beta"):
            self._check_finite(name)

    def check_manifest_hash(self) -> None:
        """Raises FormatError (manifest-hash) when the manifest does not match its hash; cheap."""
        stated, found = self._outline.manifest_hash, manifest_hash(self.manifest)
        if stated not in (None, found):
            raise FormatError(
                Code.MANIFEST_HASH,
                f"the manifest is {found}, not {stated}",
                self._metadata_offset,
            )

    def payload_hash(self) -> str:
        """`sha256:…` of the tensors as they are in the file, whatever the manifest says."""
        return payload_hash(self.tensors, {name: self._digest(name) for name in self.tensors})

    def verify(self, deep: bool = True) -> None:
        """Checks what `open` did not look at; raises FormatError.

        Always checks that the manifest is canonical, and its hash, token ids, positions and beta.
        With `deep`, also the payload hash, that every key, value, scale, zero and state is finite,
        and that codes are in range; this reads the whole file.
        """
        if self._text != canonical_json(self.manifest):
            raise FormatError(
                Code.MANIFEST_CANONICAL,
                "the manifest is not in canonical form",
                self._metadata_offset,
            )
        self.check_manifest_hash()
        self._check_range(TOKEN_IDS, 0, limits.MAX_TOKENS, Code.TOKEN_ID)
        for name in self._named("positions"):
            self._check_range(name, -1, self.logical_length - 1, Code.POSITION)
        self.check_beta()
        if not deep:
            return
        found = self.payload_hash()
        if found != self._outline.payload_hash:
            raise FormatError(
                Code.PAYLOAD_HASH,
                f"the payload is {found}, not {self._outline.payload_hash}",
                self._payload_offset,
            )
        for name in self.tensors:
            if name.startswith(STATE):
                self._check_finite(name)
        for i, layer in enumerate(self.layers):
            for part in ("keys", "values"):
                self._check_matrix(layer_tensor(i, part), layer.store)

    def close(self) -> None:
        """Releases the mapping; views still in use keep it alive."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with suppress(BufferError):
                mapping.close()

    def __enter__(self) -> AmkvFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _named(self, part: str) -> list[str]:
        return [
            name
            for name in self.tensors
            if name.endswith(f".{part}") and not name.startswith(EXTENSION)
        ]

    def _digest(self, name: str) -> str:
        view = self.read(name)
        digest = hashlib.sha256()
        for start in range(0, len(view), _HASH_CHUNK):
            digest.update(view[start : start + _HASH_CHUNK])
        return digest.hexdigest()

    def _check_finite(self, name: str) -> None:
        info = self.tensors[name]
        at = contents.first_non_finite(self.read(name), info.dtype)
        if at is not None:
            raise FormatError(
                Code.NOT_FINITE,
                f"{name} holds NaN or infinity at element {at}",
                info.offset + at * ITEM_BYTES[info.dtype],
            )

    def _check_matrix(self, name: str, store: str) -> None:
        if store == NATIVE:
            self._check_finite(name)
            return
        if store not in PACKED:  # which have no codes that are not allowed
            self._check_codes(name)
        scales = self.tensors[f"{name}.scale"]
        at = contents.first_bad_scale(self.read(scales.name))
        if at is not None:
            raise FormatError(
                Code.SCALE,
                f"{scales.name} is negative, NaN or infinite at element {at}",
                scales.offset + at * ITEM_BYTES[scales.dtype],
            )
        if (zeros := f"{name}.zero") in self.tensors:
            self._check_finite(zeros)

    def _check_codes(self, name: str) -> None:
        codes = self.tensors[name]
        at = contents.first_bad_code(self.read(name), codes.dtype)
        if at is not None:
            raise FormatError(
                Code.CODE, f"{name} holds a code outside its range at byte {at}", codes.offset + at
            )

    def _check_range(self, name: str, low: int, high: int, code: Code) -> None:
        info = self.tensors[name]
        found = contents.first_outside(self.read(name), low, high)
        if found is not None:
            at, value = found
            raise FormatError(code, f"{name} holds {value} at element {at}", info.offset + 4 * at)


def _map(descriptor: int) -> tuple[mmap.mmap, int]:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise FormatError(Code.NOT_REGULAR, "the path is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(Code.NOT_REGULAR, "the path is a device, pipe or socket")
    if status.st_size < 8:
        raise FormatError(Code.TOO_SHORT, f"the file has {status.st_size} bytes", 0)
    try:
        return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ), status.st_size
    except ValueError:
        raise FormatError(Code.PAYLOAD_TRUNCATED, "the file shrank while it was opened") from None


def _manifest_text(header: Header) -> str:
    if header.metadata.keys() != {"amkv"}:
        keys = ", ".join(sorted(header.metadata))[:80] or "no key"
        raise FormatError(Code.METADATA, f"the metadata holds {keys}, not the single key amkv")
    text = header.metadata["amkv"]
    if (size := len(text.encode("utf-8"))) > limits.MAX_MANIFEST_BYTES:
        raise FormatError(Code.MANIFEST_SIZE, f"the manifest has {size} bytes")
    return text
