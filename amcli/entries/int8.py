"""The store `int8`: 8 bits per number, keys as they are; see `blocks`."""

from __future__ import annotations

from amcli.entries.blocks import BlockQuantizer
from amcli.entries.stores import register

register(BlockQuantizer("int8", 8, rotate=False))
