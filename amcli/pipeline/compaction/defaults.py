"""What a compaction does by default. Imports nothing, torch least of all."""

from __future__ import annotations

DEFAULT_RATIO = 20.0

AUTO = "auto"
"""What a request may give as a ratio: the largest that has AUTO_FIDELITY, found by `fidelity`. And
as a store, besides those of `entries.catalogue`: the one that `choices` picks for each layer, for
the document and size at hand, COARSE or FINE."""

AUTO_FIDELITY = 0.97
"""The fidelity that the ratio AUTO looks for. With the defaults, small real models lost 0.6% to
3.2% of quotes at 20x and 2.7% to 8% at 40x (docs/methods.md, "Held-out text"): 3% lies where the
loss begins to grow fast. One of them lost up to 3% by 4 bits alone, at any ratio that leaves no
room for every key in 8, so to lose less costs it a multiple of the bytes."""

COARSE = "k4v4"
"""The store of most layers: at equal bytes it loses least of the answers of three real models."""

FINE = "k8v8"
"""The store of layers that COARSE would spoil, of all where it leaves room for every key, and of
sliding windows."""
