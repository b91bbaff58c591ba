"""The store `int4`: 4 bits per number, keys through `hadamard` first; see `blocks`."""

from __future__ import annotations

from amcli.entries.blocks import BlockQuantizer
from amcli.entries.stores import register

register(BlockQuantizer("int4", 4, rotate=True))
