"""The stores `k{K}v{V}`: K bits for a number of a key, V for one of a value.

See `grouped` and `turned`. Both put codes into bytes as `planes` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from amcli.entries import grouped, turned
from amcli.entries.catalogue import PACKED
from amcli.entries.grouped import GROUP, Grouped, groups
from amcli.entries.planes import multiple
from amcli.entries.stores import Quantizer, register
from amcli.entries.turned import Turned


class PackedQuantizer(Quantizer):
    """The store of that name, one of `catalogue.PACKED`."""

    group = GROUP

    def __init__(self, name: str):
        self.name = name
        self.key_bits, self.value_bits = PACKED[name]

    @property
    def multiples(self) -> tuple[int, int]:
        """What a row of codes has to be a multiple of to fill its bytes."""
        return multiple(self.key_bits), multiple(self.value_bits)

    def keys(self, x: torch.Tensor, lengths: tuple[int, ...]) -> Grouped:
        """Keys as codes."""
        return grouped.quantize(x, lengths, self.name)

    def values(self, x: torch.Tensor, lengths: tuple[int, ...]) -> Turned:
        """Values as codes."""
        return turned.quantize(x, self.name)

    def read_keys(self, parts: Mapping[str, torch.Tensor], lengths: tuple[int, ...]) -> Grouped:
        """Keys as codes, in groups that begin with each head."""
        return Grouped(parts[""], parts[".scale"], parts[".zero"], self.name, lengths)

    def read_values(self, parts: Mapping[str, torch.Tensor], lengths: tuple[int, ...]) -> Turned:
        """Values as codes."""
        return Turned(parts[""], parts[".scale"], self.name)

    def entry_bytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of the codes of one key and one value, and of the value's scales."""
        scales = turned.SCALE_BYTES * (value_dim // turned.block_size(value_dim))
        return key_dim * self.key_bits // 8 + value_dim * self.value_bits // 8 + scales

    def group_bytes(self, key_dim: int) -> int:
        """Bytes of the zeros and scales of one group of keys."""
        return 4 * key_dim

    def tensor_rows(self, name: str, lengths: Sequence[int]) -> int:
        """One for each group of zeros and scales of keys, one for each entry of the others."""
        return groups(lengths) if name in ("keys.scale", "keys.zero") else sum(lengths)


for _name in PACKED:
    register(PackedQuantizer(_name))
