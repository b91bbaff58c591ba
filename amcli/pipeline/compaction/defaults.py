"""What a compaction does by default. Imports nothing, torch least of all."""

from __future__ import annotations

DEFAULT_RATIO = 20.0

AUTO = "auto"
"""A name that a request may give besides the stores of `entries.catalogue`: the store that
`choices` picks for the document and size at hand."""
