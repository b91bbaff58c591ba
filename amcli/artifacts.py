"""Artifacts as torch tensors: writes `.amkv` files and reads them back.

Joins `amkv_format` (bytes) and the entries of layers (tensors), and turns what can go wrong with
files into errors a user understands. Knows nothing of models or methods.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from amcli.errors import ArtifactError
from amcli.files import open_artifact, output_errors
from amcli.quantize import QUANTIZERS, Entries, Packed, QuantizedHeads
from amcli.ragged import RaggedHeads
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
_WRITE_CHUNK = 1 << 22  # elements copied from the device at a time


class Artifact:
    """An `.amkv` file opened and checked; tensors are read when they are asked for."""

    def __init__(self, file: AmkvFile, path: Path):
        self._file = file
        self.path = path
        self.manifest: dict[str, Any] = file.manifest
        self.kind: str = file.kind
        self.logical_length: int = file.logical_length
        self.layers = file.layers
        self.ratio: float = file.ratio
        self.store: str = file.store

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
            raise ArtifactError(f"{self.path} is not a valid .amkv file: {error}") from error

    def heads(self, layer: int, device: torch.device | str = "cpu") -> Entries:
        """The entries of one layer on a device, as they are in the file: numbers or codes."""

        def tensor(name: str) -> torch.Tensor:
            return self._tensor(name, device)

        def packed(name: str, rotated: bool) -> Packed:
            return Packed(tensor(name), tensor(f"{name}.scale"), rotated)

        name = layer_tensor(layer, "beta")
        beta = tensor(name) if name in self._file.tensors else None
        stored = tuple(self.layers[layer].stored)
        keys, values = layer_tensor(layer, "keys"), layer_tensor(layer, "values")
        if f"{keys}.scale" not in self._file.tensors:
            return RaggedHeads(tensor(keys), tensor(values), beta, stored)
        turned = QUANTIZERS[self.store].rotate
        return QuantizedHeads(packed(keys, turned), packed(values, False), beta, stored)

    def states(self) -> dict[tuple[int, str], torch.Tensor]:
        """What layers without keys and values keep, by the model's layer and a name."""
        return {place: self._tensor(name) for place, name in self._states().items()}

    def state_shapes(self) -> dict[tuple[int, str], tuple[int, ...]]:
        """The shapes of `states`, for which nothing is read."""
        return {place: self._file.tensors[name].shape for place, name in self._states().items()}

    def _states(self) -> dict[tuple[int, str], str]:
        """The tensor of each state."""
        places = [(x["layer"], x["name"]) for x in self.manifest.get("states", [])]
        return {place: state_tensor(n) for n, place in enumerate(places)}

    @property
    def payload_bytes(self) -> int:
        """Bytes of all keys, values, scales and biases, sliding-window layers included."""
        return sum(t.nbytes for name, t in self._file.tensors.items() if name != TOKEN_IDS)

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
            # Copied, so that nobody who changes the file later changes (or kills) a session.
            raw = bytearray(raw)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            mapped = torch.frombuffer(raw, dtype=dtype)
        # On another device it is a copy in any case, and one straight from the file's mapping.
        return mapped.reshape(info.shape).to(device)


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
    """Writes one artifact whole or not at all; returns the manifest as it is in the file.

    states  what layers without keys and values keep, by the model's layer and a name
    positions  layer -> the token each entry was taken from, `[N]` int32

    The manifest's `store` has to say what entries as codes are. Raises UsageError when the file
    exists (and not `overwrite`) or its folder does not, OutOfMemoryError when the disk is full,
    OutputError for anything else the system refuses.
    """
    tensors = list(_tensors(token_ids, layers))
    tensors += [(layer_tensor(i, "positions"), x) for i, x in (positions or {}).items()]
    if states:
        manifest = {**manifest, "states": [{"layer": i, "name": name} for i, name in states]}
        tensors += [(state_tensor(n), x) for n, x in enumerate(states.values())]
    specs = [TensorSpec(name, _NAMES[x.dtype], tuple(x.shape)) for name, x in tensors]
    with output_errors(path), Writer(path, specs, overwrite=overwrite) as writer:
        for name, tensor in tensors:
            for part in torch.split(tensor.reshape(-1), _WRITE_CHUNK):
                writer.write(name, part.cpu().contiguous().view(torch.uint8).numpy().data)
        return writer.finish(manifest)


def _tensors(
    token_ids: Sequence[int], layers: Sequence[Entries]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield TOKEN_IDS, torch.tensor(list(token_ids), dtype=torch.int32)
    for i, heads in enumerate(layers):
        for name, part in (("keys", heads.keys), ("values", heads.values)):
            if isinstance(part, Packed):
                yield layer_tensor(i, name), part.codes
                yield layer_tensor(i, f"{name}.scale"), part.scale
            else:
                yield layer_tensor(i, name), part
        if heads.beta is not None:
            yield layer_tensor(i, "beta"), heads.beta
