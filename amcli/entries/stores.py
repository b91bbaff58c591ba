"""Ways to store entries: what a store has to define, and how it is found by name.

A store is a `Quantizer` that a module in this folder registers; its name and a line of help are in
`catalogue`. See `blocks` for an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from itertools import accumulate

import torch

from amcli.entries.catalogue import NATIVE, PACKED, STORES
from amcli.entries.matrix import Matrix, Numbers, UnstorableError
from amcli.entries.ragged import Entries


class Quantizer(ABC):
    """A way to store entries in fewer bits than the model's dtype.

    Keys and values are given as `[N, d]` in any float dtype, head after head in `lengths`. NaN and
    infinity, and numbers too large for the store, raise UnstorableError, a ValueError; so do head
    dimensions that are not a multiple of `multiples`. Packing what was unpacked changes nothing
    further.

    name   name of the store
    group  if not 0, that many consecutive keys of a head share something that is stored with them,
           counted from its first; see `group_bytes`
    """

    name: str
    group: int = 0

    @property
    def multiples(self) -> tuple[int, int]:
        """Dimensions of keys and of values have to be a multiple of these."""
        return 1, 1

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
        """Bytes of one key and one value, without what a group shares."""

    def group_bytes(self, key_dim: int) -> int:
        """Bytes that every begun group of a head costs besides."""
        return 0

    def tensor_rows(self, name: str, lengths: Sequence[int]) -> int:
        """Rows of the tensor of that name, as in `Entries.tensors`, for heads of these lengths."""
        return sum(lengths)

    def pack(self, entries: Entries) -> Entries:
        """Entries given as numbers, as codes."""
        keys, values, t = entries.keys.unpack(), entries.values.unpack(), entries.lengths
        return Entries(self.keys(keys, t), self.values(values, t), entries.beta, t)

    def round_keys(self, keys: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Keys `[H, n, d]` as they will be read back, float32: the first `lengths[h]` rows of head
        `h`, in the order in which they will be stored. The rest is padding and stays as it is.

        The error of a number that cannot be stored gets its `head`.
        """
        H, n, d = keys.shape
        # On the CPU, which knows the lengths.
        real = torch.arange(n) < torch.tensor(list(lengths)).unsqueeze(1)
        rows = real.reshape(-1).nonzero().squeeze(1).to(keys.device)
        read = keys.float().reshape(H * n, d)
        with _in_head(list(accumulate(lengths))):
            rounded = self.keys(keys.reshape(H * n, d)[rows], tuple(lengths)).unpack()
        return read.index_copy(0, rows, rounded).view(H, n, d)

    def round_values(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[H, n, dv]` as they will be read back, float32; rows do not influence each other.

        The error of a number that cannot be stored gets its `head`.
        """
        H, n, dv = values.shape
        with _in_head([n * (h + 1) for h in range(H)]):
            return self.values(values.reshape(H * n, dv), (n,) * H).unpack().view(H, n, dv)


@contextmanager
def _in_head(ends: Sequence[int]) -> Iterator[None]:
    """Says in which head a number is that cannot be stored; `ends`: the row after each head."""
    try:
        yield
    except UnstorableError as error:
        error.head = bisect_right(ends, error.row)
        raise


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
        import_module(f"amcli.entries.{'packed' if store in PACKED else store}")
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


def settled(entries: Entries) -> Entries:
    """The entries as a file can hold them: keys that were joined in groups of their own are rounded
    again, in groups that begin with the head; all others as they are."""
    if entries.keys.fits(entries.lengths):
        return entries
    return with_keys(entries, entries.keys.unpack(), torch.float32)
