"""The stores by name, for help, completion and checks. Imports nothing, torch least of all.

Every store except `native` is a module of that name in this folder, which registers it; `stores`
imports the module when the store is first asked for.
"""

from __future__ import annotations

NATIVE = "native"

STORES: dict[str, str] = {
    NATIVE: "the model's dtype",
    "int8": "8 bits a number and a scale for each 32",
    "int4": "4 bits a number and a scale for each 32, keys turned first",
}
"""Stores by name, each with a line on what is stored."""
