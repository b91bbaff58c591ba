"""What a compaction does where nothing is said. Imports nothing, torch least of all."""

from __future__ import annotations

DEFAULT_RATIO = 20.0

AUTO = "auto"
"""What a request may name besides the stores of `entries.catalogue`: the store as `choices` has it
for the document and the size at hand."""
