"""The stores by name, for help, completion and checks. Imports nothing, torch least of all.

Every store except `native` is registered by a module in this folder, of its name or, for those in
`PACKED`, `packed`; `stores` imports the module when the store is first asked for.
"""

from __future__ import annotations

NATIVE = "native"

MIXED = "mixed"
"""In place of a store's name: layers are stored in different ways."""

BITS = (8, 4, 3, 2)

PACKED = {f"k{k}v{v}": (k, v) for k in BITS for v in BITS}
"""The stores `k{K}v{V}` by name, each with its bits for a number of a key and of a value."""

STORES: dict[str, str] = {
    NATIVE: "the model's dtype",
    "int8": "8 bits a number and a scale for each 32",
    "int4": "4 bits a number and a scale for each 32, keys turned first",
    **{
        name: f"{k} bits a number of a key, by channel, and {v} of a value, turned first"
        for name, (k, v) in PACKED.items()
    },
}
"""Stores by name, each with a line on what is stored."""
