"""Artifacts as torch tensors: writes `.amkv` files and reads them back.

Joins `amkv_format` (bytes) and the entries of layers (tensors), and turns failures with files into
errors a user understands. Knows nothing of models or methods.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from amcli.entries import stores
from amcli.entries.catalogue import MIXED, NATIVE
from amcli.entries.ragged import Entries
from amcli.errors import ArtifactError
from amcli.storage.summary import payload_bytes
from amcli.system.files import open_artifact, output_errors
from amkv_format import (
    TOKEN_IDS,
    AmkvFile,
    FormatError,
    TensorSpec,
    Writer,
    layer_tensor,
    state_tensor,
)

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_POSITIONS = "positions"  # the one tensor of a layer that is not in its entries
_WRITE_CHUNK = 1 << 22  # elements copied from the device at a time
_WRITERS = 4  # threads: hashing is slower than disks, and each tensor has a hash of its own


class Artifact:
    """An `.amkv` file, opened and checked; tensors are read when asked for."""

    def __init__(self, file: AmkvFile, path: Path):
        self._file = file
        self.path = path
        self.manifest: dict[str, Any] = file.manifest
        self.kind: str = file.kind
        self.logical_length: int = file.logical_length
        self.layers = file.layers
        self.ratio: float = file.ratio
        self.store: str = file.store  # "mixed" where `layers` say the store of each

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Artifact:
        """Opens `path`; raises UsageError when it cannot be read, ArtifactError when invalid."""
        return cls(open_artifact(path), Path(path))

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def token_ids(self) -> list[int]:
        """The `T` token ids of the context."""
        try:
            return self._file.token_ids().tolist()
        except FormatError as error:
            raise ArtifactError(
                f"{self.path} is not a valid .amkv file: {error}",
                code="artifact-damaged",
                field="path",
                path=self.path,
            ) from error

    def heads(self, layer: int, device: torch.device | str = "cpu") -> Entries:
        """The entries of one layer on a device, as in the file: numbers or codes."""
        about, start = self.layers[layer], layer_tensor(layer, "")
        tensors = {
            name.removeprefix(start): self._tensor(name, device)
            for name in self._file.tensors
            if name.startswith(start) and name != layer_tensor(layer, _POSITIONS)
        }
        return stores.read(about.store, tensors, tuple(about.stored))

    def states(self) -> dict[tuple[int, str], torch.Tensor]:
        """The states of layers without keys and values, by the model's layer and a name."""
        return {place: self._tensor(name) for place, name in self._states().items()}

    def state_shapes(self) -> dict[tuple[int, str], tuple[int, ...]]:
        """The shapes of `states`, without reading any."""
        return {place: self._file.tensors[name].shape for place, name in self._states().items()}

    def _states(self) -> dict[tuple[int, str], str]:
        """The tensor name of each state."""
        places = [(x["layer"], x["name"]) for x in self.manifest.get("states", [])]
        return {place: state_tensor(n) for n, place in enumerate(places)}

    @property
    def payload_bytes(self) -> int:
        """Bytes of all that the model attends to; see `summary.payload_bytes`."""
        return payload_bytes(self._file)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of layers without keys and values."""
        return sum(self._file.tensors[name].nbytes for name in self._states().values())

    @property
    def full_bytes(self) -> int:
        """Bytes the same layers would take uncompacted."""
        return self._file.full_bytes

    def _tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        info = self._file.tensors[name]
        dtype = _DTYPES[info.dtype]
        raw: memoryview | bytearray = self._file.read(name)
        if not raw:
            return torch.empty(info.shape, dtype=dtype, device=device)
        if torch.device(device).type == "cpu":
            # Copied, so that a later change to the file cannot change (or kill) a session.
            raw = bytearray(raw)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            mapped = torch.frombuffer(raw, dtype=dtype)
        # On another device it is a copy anyway, made straight from the file's mapping.
        return mapped.reshape(info.shape).to(device)


class NewArtifact:
    """One artifact in the making: its tensors are copied, hashed and written in the background.

        with NewArtifact(path) as new:
            new.begin(specs)
            new.put(name, tensor)  # returns at once; the tensor must not change
            manifest = new.finish(manifest)

    There is no file at `path` until `finish` returns, and none is left behind if the block ends
    any other way. `begin`, `finish` and leaving the block raise UsageError when the file exists
    (unless `overwrite`) or its folder does not, OutOfMemoryError when the disk is full,
    OutputError for anything else the system refuses.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.path = path
        self._overwrite = overwrite
        self._open = ExitStack()
        self._writer: Writer | None = None
        self._workers = ThreadPoolExecutor(min(_WRITERS, os.cpu_count() or 1), "amkv-write")
        self._put: dict[str, Future[None]] = {}
        self._stopped = False

    def __enter__(self) -> NewArtifact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped = True
        self._workers.shutdown(cancel_futures=True)
        self._open.__exit__(kind, error, trace)

    @property
    def begun(self) -> bool:
        """Whether `begin` has been called."""
        return self._writer is not None

    def begin(self, specs: Sequence[TensorSpec]) -> None:
        """Opens a temporary file for these tensors."""
        with output_errors(self.path):
            writer = Writer(self.path, specs, overwrite=self._overwrite)
            self._writer = self._open.enter_context(writer)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Queues a tensor for writing, unless it is already written or queued."""
        if name not in self._put:
            self._put[name] = self._workers.submit(self._write, name, tensor.detach())

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        for part in torch.split(tensor.reshape(-1), _WRITE_CHUNK):
            if self._stopped or self._writer is None:
                return
            self._writer.write(name, part.cpu().contiguous().view(torch.uint8).numpy().data)

    def finish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the file its name once all tensors are in it; returns the manifest as written."""
        if self._writer is None:
            raise ValueError("no tensors were announced")
        with output_errors(self.path):
            for written in self._put.values():
                written.result()
            return self._writer.finish(manifest)


def write_artifact(
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    token_ids: Sequence[int],
    layers: Sequence[Entries],
    states: Mapping[tuple[int, str], torch.Tensor] | None = None,
    positions: Mapping[int, torch.Tensor] | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes one artifact, whole or not at all; returns the manifest as written.

    Arguments as for `complete`; raises what `NewArtifact` does.
    """
    with NewArtifact(path, overwrite) as new:
        return complete(new, manifest, token_ids, layers, states, positions)


def complete(
    new: NewArtifact,
    manifest: Mapping[str, Any],
    token_ids: Sequence[int],
    layers: Sequence[Entries],
    states: Mapping[tuple[int, str], torch.Tensor] | None = None,
    positions: Mapping[int, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Puts what is still missing into an artifact and finishes it.

    states     states of layers without keys and values, by the model's layer and a name
    positions  layer -> the token each entry was taken from, `[N]` int32

    The manifest has to say how entries are stored, if not as numbers; see `stores_recorded`.
    """
    tensors = dict(named(token_ids, layers, states, positions))
    if states:
        manifest = {**manifest, "states": [{"layer": i, "name": name} for i, name in states]}
    if not new.begun:
        new.begin([spec(name, x) for name, x in tensors.items()])
    for name, tensor in tensors.items():
        new.put(name, tensor)
    return new.finish(manifest)


def stores_recorded(layers: Sequence[Entries], full: Collection[int]) -> dict[str, Any]:
    """The manifest's fields for how entries are stored: `store`, and `stores` if it is `mixed`.

    full  indices of the layers that can be compacted
    """
    names = [entries.store for entries in layers]
    alike = {names[i] for i in full} or {NATIVE}
    if len(alike) > 1 or any(x != NATIVE for i, x in enumerate(names) if i not in full):
        return {"store": MIXED, "stores": names}
    return {"store": alike.pop()}


def spec(name: str, tensor: torch.Tensor, rows: int | None = None) -> TensorSpec:
    """The spec of a tensor; with `rows`, of one like it that will have that many rows."""
    shape = tuple(tensor.shape) if rows is None else (rows, *tensor.shape[1:])
    return TensorSpec(name, _NAMES[tensor.dtype], shape)


def named(
    token_ids: Sequence[int],
    layers: Sequence[Entries],
    states: Mapping[tuple[int, str], torch.Tensor] | None = None,
    positions: Mapping[int, torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an artifact by name, in the order of the file."""
    yield TOKEN_IDS, torch.tensor(list(token_ids), dtype=torch.int32)
    for i, heads in enumerate(layers):
        yield from named_entries(i, heads)
    for i, places in (positions or {}).items():
        yield layer_tensor(i, _POSITIONS), places
    for n, state in enumerate((states or {}).values()):
        yield state_tensor(n), state


def named_entries(i: int, heads: Entries) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of layer `i`."""
    for name, tensor in heads.tensors().items():
        yield layer_tensor(i, name), tensor
