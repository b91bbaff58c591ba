"""Writes `.amkv` files: streaming, in bounded memory, and atomically.

The tensors are declared first and may then be filled in any order, in chunks of any size; the
manifest comes last, because it holds hashes and fit errors that are known only then. Before the
file gets its name, the reader of this package has to accept it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Lock
from types import TracebackType
from typing import Any

from amkv_format.atomic import create_temporary, exists_error, publish
from amkv_format.errors import Code, FormatError
from amkv_format.header import ITEM_BYTES, TensorSpec, build_header, check_spec, frame_header
from amkv_format.jsontext import canonical_json, parse_json
from amkv_format.layout import check_tensors, compaction_ratio, payload_hash
from amkv_format.manifest import check_manifest, complete
from amkv_format.reader import AmkvFile

MOVE_CHUNK = 4 * 2**20


class _Slot:
    """A tensor's place in the payload, where `begin` is counted from, and how far it is filled."""

    def __init__(self, spec: TensorSpec, begin: int):
        self.spec = spec
        self.begin = begin
        self.filled = 0
        self.digest = hashlib.sha256()


class Writer:
    """Context manager that makes one `.amkv` file.

        with Writer(path, specs) as writer:
            writer.write("token_ids", chunk)
            ...
            manifest = writer.finish(manifest)

    path       the file to make; its folder has to exist
    specs      every tensor, with unique names. In the file the 4-byte dtypes come first, so that
               all are aligned; otherwise the order is kept
    overwrite  whether an existing file may be replaced
    room       bytes to reserve for the manifest; too few cost a second pass over the payload

    There is no file at `path` until `finish` returns, and none is left behind if the block ends
    any other way: by an exception, KeyboardInterrupt, or without `finish`.

    Raises FormatError when the specs, the manifest or the contents are not valid (the codes are
    those of the reader), FileExistsError, any other OSError as the system gives it, ValueError
    when chunks do not add up to the specs, and KeyError for a tensor without a spec.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Sequence[TensorSpec],
        *,
        overwrite: bool = False,
        room: int | None = None,
    ):
        self._path = os.fspath(path)
        self._overwrite = overwrite
        self._slots = _place(specs)
        self._payload_bytes = sum(spec.nbytes for spec in specs)
        if room is None:
            room = 4096 + 256 * len(specs)
        text = build_header([(s.spec, s.begin) for s in self._slots.values()], {})
        self._payload_offset = -(-(len(text) + room) // 8) * 8
        self._file: io.FileIO | None = None
        self._moving = Lock()  # guards the position in the file
        self._temporary: str | None = None
        self._finished = False

    def __enter__(self) -> Writer:
        if not self._overwrite and os.path.lexists(self._path):
            raise exists_error(self._path)
        if os.path.isdir(self._path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self._path)
        descriptor, self._temporary = create_temporary(self._path)
        self._file = io.FileIO(descriptor, "r+")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary)
        if error is None and not self._finished:
            raise ValueError(f"{self._path} was not written: finish() was not called")

    def write(self, name: str, chunk: bytes | bytearray | memoryview) -> None:
        """Appends `chunk` to the tensor `name`: raw little-endian elements, C order.

        A chunk is any contiguous buffer and may end anywhere. It is not kept. Several threads may
        write at once, each its own tensors: hashing, which takes longest, then runs in parallel.
        """
        slot = self._slots[name]
        view = memoryview(chunk)
        if view.nbytes == 0:  # such a view cannot be cast
            return
        view = view.cast("B")
        if slot.filled + view.nbytes > slot.spec.nbytes:
            raise ValueError(
                f"{name} takes {slot.spec.nbytes} bytes, was given {slot.filled + view.nbytes}"
            )
        with self._moving:
            write_at(self._opened(), self._payload_offset + slot.begin + slot.filled, view)
        slot.digest.update(view)
        slot.filled += view.nbytes

    def finish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the header, checks the file, syncs it, and gives it its name.

        The manifest may leave out `format`, `version`, `features_required`, `created`,
        `ratio`, and the hashes. Returns it complete, as written to the file.
        """
        file = self._opened()
        for slot in self._slots.values():
            if slot.filled != slot.spec.nbytes:
                raise ValueError(
                    f"{slot.spec.name} takes {slot.spec.nbytes} bytes, was given {slot.filled}"
                )
        text = self._complete(manifest)
        self._write_header(file, text)
        with AmkvFile.from_descriptor(file.fileno(), self._path) as written:
            written.verify(deep=False)
            result = written.manifest
        os.fsync(file.fileno())
        file.close()
        if self._temporary is not None:
            publish(self._temporary, self._path, self._overwrite)
        self._temporary = None
        self._finished = True
        return result

    def _opened(self) -> io.FileIO:
        if self._file is None or self._file.closed:
            raise ValueError("the writer is not open: use it in a with block, up to finish()")
        return self._file

    def _complete(self, manifest: Mapping[str, Any]) -> str:
        """The manifest as canonical JSON, with the hash and the ratio filled in."""
        specs = {name: slot.spec for name, slot in self._slots.items()}
        digests = {name: slot.digest.hexdigest() for name, slot in self._slots.items()}
        hash_ = payload_hash(specs, digests)
        ratio = None
        if manifest.get("kind") == "compact" and "ratio" not in manifest:
            draft = parse_json(canonical_json(complete(manifest, hash_, ratio=1.0)))
            outline = replace(check_manifest(draft), ratio=None)
            check_tensors(outline, specs)
            ratio = compaction_ratio(outline, specs)
        text = canonical_json(complete(manifest, hash_, ratio))
        parse_json(text)  # refuses what UTF-8 cannot encode, before anything tries
        return text

    def _write_header(self, file: io.FileIO, manifest: str) -> None:
        placed = [(slot.spec, slot.begin) for slot in self._slots.values()]
        header = build_header(placed, {"amkv": manifest})
        if len(header) < self._payload_offset:
            # Fill with spaces up to the payload; spare room costs only a few kilobytes.
            header = frame_header(header[8:], self._payload_offset - 8)
        elif len(header) > self._payload_offset:
            _move(file, self._payload_offset, self._payload_bytes, len(header))
            self._payload_offset = len(header)
        write_at(file, 0, memoryview(header))


def write_file(
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    tensors: Iterable[tuple[TensorSpec, bytes | bytearray | memoryview]],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a file whose tensors are in memory; otherwise like `Writer`."""
    tensors = list(tensors)
    with Writer(path, [spec for spec, _ in tensors], overwrite=overwrite) as writer:
        for spec, data in tensors:
            writer.write(spec.name, data)
        return writer.finish(manifest)


def _place(specs: Sequence[TensorSpec]) -> dict[str, _Slot]:
    """A place for every tensor, in file order: those with 4-byte elements first."""
    slots: dict[str, _Slot] = {}
    for spec in specs:
        check_spec(spec)
    begin = 0
    for spec in sorted(specs, key=lambda s: -ITEM_BYTES[s.dtype]):
        if spec.name in slots:
            raise FormatError(Code.JSON_DUPLICATE, f"the tensor {spec.name} comes twice")
        slots[spec.name] = _Slot(spec, begin)
        begin += spec.nbytes
    return slots


def write_at(file: io.FileIO, offset: int, view: memoryview) -> None:
    """Writes all of `view`: the system may take less than it is given in one call."""
    file.seek(offset)
    while view.nbytes:
        view = view[file.write(view) :]


def _move(file: io.FileIO, start: int, count: int, target: int) -> None:
    """Moves `count` bytes from `start` up to `target`, last bytes first, as the ranges overlap."""
    end = count
    while end:
        begin = max(0, end - MOVE_CHUNK)
        file.seek(start + begin)
        chunk = bytearray()
        while len(chunk) < end - begin:
            piece = file.read(end - begin - len(chunk))
            if not piece:
                raise OSError(errno.EIO, "the temporary file was changed by somebody else")
            chunk += piece
        write_at(file, target + begin, memoryview(chunk))
        end = begin
