"""What a compaction does by default. Imports nothing, torch least of all."""

from __future__ import annotations

DEFAULT_RATIO = 20.0

AUTO = "auto"
"""A name that a request may give besides the stores of `entries.catalogue`: the store that
`choices` picks for each layer, for the document and size at hand: COARSE or FINE."""

COARSE = "k4v4"
"""The store of most layers: at equal bytes it loses least of the answers of three real models."""

FINE = "k8v8"
"""The store of layers that COARSE would spoil, of all where it leaves room for every key, and of
sliding windows."""
