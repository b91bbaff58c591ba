"""Ways to store entries: what a store has to define, and how it is found by name.

A store is one module in this folder, named like the store, that registers a `Quantizer`; its name
and a line of help are in `catalogue`. See `blocks` for an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module

import torch

from amcli.entries.catalogue import NATIVE, STORES
from amcli.entries.matrix import Matrix, Numbers
from amcli.entries.ragged import Entries


class Quantizer(ABC):
    """A way to store entries in fewer bits than the model's dtype.

    Keys and values are given as `[N, d]` in any float dtype, head after head in `lengths`. NaN,
    infinity and head dimensions that are not a multiple of `multiple` raise a ValueError. Packing
    what was unpacked changes nothing further.

    name  name of the store
    """

    name: str

    @property
    def multiple(self) -> int:
        """Head dimensions have to be a multiple of this."""
        return 1

    @abstractmethod
    def keys(self, x: torch.Tensor, lengths: tuple[int, ...]) -> Matrix:
        """Keys as codes."""

    @abstractmethod
    def values(self, x: torch.Tensor, lengths: tuple[int, ...]) -> Matrix:
        """Values as codes."""

    @abstractmethod
    def read_keys(self, parts: Mapping[str, torch.Tensor], lengths: tuple[int, ...]) -> Matrix:
        """Keys as codes, from their `parts`."""

    @abstractmethod
    def read_values(self, parts: Mapping[str, torch.Tensor], lengths: tuple[int, ...]) -> Matrix:
        """Values as codes, from their `parts`."""

    @abstractmethod
    def entry_bytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of one key and one value."""

    def pack(self, entries: Entries) -> Entries:
        """Entries given as numbers, as codes."""
        keys, values, t = entries.keys.unpack(), entries.values.unpack(), entries.lengths
        return Entries(self.keys(keys, t), self.values(values, t), entries.beta, t)

    def round_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys `[..., n, d]` as they will be read back, float32: each `[n, d]` is a head."""
        flat = keys.reshape(-1, keys.shape[-1])
        return self.keys(flat, _heads_of(keys)).unpack().reshape(keys.shape)

    def round_values(self, values: torch.Tensor) -> torch.Tensor:
        """Values as they will be read back, as `round_keys`."""
        flat = values.reshape(-1, values.shape[-1])
        return self.values(flat, _heads_of(values)).unpack().reshape(values.shape)


def _heads_of(x: torch.Tensor) -> tuple[int, ...]:
    n = x.shape[-2] if x.ndim > 1 else 1
    return (n,) * (x.shape[:-1].numel() // max(1, n))


QUANTIZERS: dict[str, Quantizer] = {}
"""The stores besides `native` that are loaded."""


def register(quantizer: Quantizer) -> None:
    """Make a store known to `quantizer_of` and `read`."""
    QUANTIZERS[quantizer.name] = quantizer


def quantizer_of(store: str) -> Quantizer | None:
    """The quantizer of that name; None for `native`. Raises ValueError for any other name."""
    if store == NATIVE:
        return None
    if store not in QUANTIZERS and store in STORES:
        import_module(f"amcli.entries.{store}")
    if store not in QUANTIZERS:
        raise ValueError(f"unknown store {store!r}")
    return QUANTIZERS[store]


def read(store: str, tensors: Mapping[str, torch.Tensor], lengths: tuple[int, ...]) -> Entries:
    """Entries in that store, from the tensors, or rows of them, that `Entries.tensors` gave."""
    parts: dict[str, dict[str, torch.Tensor]] = {"keys": {}, "values": {}, "beta": {}}
    for name, tensor in tensors.items():
        which, dot, rest = name.partition(".")
        parts[which][dot + rest] = tensor
    quantizer, beta = quantizer_of(store), parts["beta"].get("")
    keys: Matrix
    values: Matrix
    if quantizer is None:
        keys, values = Numbers.read(parts["keys"]), Numbers.read(parts["values"])
    else:
        keys = quantizer.read_keys(parts["keys"], lengths)
        values = quantizer.read_values(parts["values"], lengths)
    return Entries(keys, values, beta, lengths)


def with_keys(entries: Entries, keys: torch.Tensor, dtype: torch.dtype) -> Entries:
    """The same entries with other keys `[N, d]`, in the same store; numbers in `dtype`."""
    quantizer = quantizer_of(entries.store)
    if quantizer is None:
        return replace(entries, keys=Numbers(keys.to(dtype)))
    return replace(entries, keys=quantizer.keys(keys, entries.lengths))
