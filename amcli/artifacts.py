"""Artifacts as torch tensors: writes `.amkv` files and reads them back.

Joins `amkv_format` (bytes) and `RaggedHeads` (tensors), and turns what can go wrong with files
into errors a user understands. Knows nothing of models or methods.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from amcli.errors import ArtifactError
from amcli.files import open_artifact, output_errors
from amcli.ragged import RaggedHeads
from amkv_format import TOKEN_IDS, AmkvFile, FormatError, TensorSpec, Writer, layer_tensor

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
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

    def heads(self, layer: int) -> RaggedHeads:
        """The entries of one layer, on the CPU, in the dtype of the file."""
        beta = layer_tensor(layer, "beta")
        return RaggedHeads(
            self._tensor(layer_tensor(layer, "keys")),
            self._tensor(layer_tensor(layer, "values")),
            self._tensor(beta) if beta in self._file.tensors else None,
            tuple(self.layers[layer].stored),
        )

    @property
    def payload_bytes(self) -> int:
        """Bytes of all keys, values and biases, sliding-window layers included."""
        return sum(t.nbytes for name, t in self._file.tensors.items() if name != TOKEN_IDS)

    @property
    def full_bytes(self) -> int:
        """Bytes the same layers would take uncompacted, in the dtype of the file."""
        total = 0
        for i, layer in enumerate(self.layers):
            size = _DTYPES[self._file.tensors[layer_tensor(i, "keys")].dtype].itemsize
            rows = self.logical_length * layer.kv_heads if layer.window is None else layer.rows
            total += rows * (layer.key_dim + layer.value_dim) * size
        return total

    def _tensor(self, name: str) -> torch.Tensor:
        info = self._file.tensors[name]
        dtype = _DTYPES[info.dtype]
        # Copied, so that nobody who changes the file later changes (or kills) a session.
        raw = bytearray(self._file.read(name))
        if not raw:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(raw, dtype=dtype).reshape(info.shape)


def write_artifact(
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    token_ids: Sequence[int],
    layers: Sequence[RaggedHeads],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes one artifact whole or not at all; returns the manifest as it is in the file.

    Raises UsageError when the file exists (and not `overwrite`) or its folder does not,
    OutOfMemoryError when the disk is full, OutputError for anything else the system refuses.
    """
    tensors = list(_tensors(token_ids, layers))
    specs = [TensorSpec(name, _name(x.dtype), tuple(x.shape)) for name, x in tensors]
    with output_errors(path), Writer(path, specs, overwrite=overwrite) as writer:
        for name, tensor in tensors:
            for part in torch.split(tensor.reshape(-1), _WRITE_CHUNK):
                writer.write(name, part.cpu().contiguous().view(torch.uint8).numpy().data)
        return writer.finish(manifest)


def _tensors(
    token_ids: Sequence[int], layers: Sequence[RaggedHeads]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield TOKEN_IDS, torch.tensor(list(token_ids), dtype=torch.int32)
    for i, heads in enumerate(layers):
        yield layer_tensor(i, "keys"), heads.keys
        yield layer_tensor(i, "values"), heads.values
        if heads.beta is not None:
            yield layer_tensor(i, "beta"), heads.beta


def _name(dtype: torch.dtype) -> str:
    return "I32" if dtype == torch.int32 else _NAMES[dtype]
