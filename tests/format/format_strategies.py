"""Hypothesis strategies that make valid files."""

from __future__ import annotations

from typing import Any

from format_samples import Tensors, layer, manifest, tensors
from hypothesis import strategies as st

from amkv_format import MIXED, PACKED, STORES

MULTIPLE = {"native": (1, 1), "int8": (1, 1), "int4": (2, 2)} | {
    name: ({8: 1, 4: 2, 3: 8, 2: 4}[k], {8: 1, 4: 2, 3: 8, 2: 4}[v])
    for name, (k, v) in PACKED.items()
}
"""What the dimensions of keys and values are a multiple of, in each store."""


@st.composite
def samples(draw: st.DrawFn) -> tuple[dict[str, Any], Tensors]:
    """A random valid manifest with its tensors: ragged, empty heads, any dims and dtype."""
    kind = draw(st.sampled_from(("prefill", "compact")))
    length = draw(st.integers(1, 9) | st.sampled_from((64, 65, 130)))  # groups are of 64
    layers, stored = [], []
    for _ in range(draw(st.integers(1, 3))):
        dims = [draw(st.integers(1, 5)) for _ in range(3)]
        sliding = draw(st.booleans())
        layers.append(layer("sliding" if sliding else "full", *dims))
        if sliding:
            stored.append([draw(st.integers(min(length, 3), min(length, 4)))] * dims[0])
        elif kind == "prefill":
            stored.append([length] * dims[0])
        else:
            stored.append([draw(st.integers(0, length)) for _ in range(dims[0])])
    full = [sum(t) for t, spec in zip(stored, layers, strict=True) if spec["type"] == "full"]
    if full and not any(full):
        stored[[spec["type"] for spec in layers].index("full")][0] = 1
    dtype = draw(st.sampled_from(("F32", "BF16", "F16")))
    store: str | list[str] = "native"
    if kind == "compact" and draw(st.booleans()):
        store = [draw(st.sampled_from(list(STORES))) for _ in layers]
    elif kind == "compact":
        store = draw(st.sampled_from(list(STORES)))
    for i, spec in enumerate(layers):
        k, v = MULTIPLE[store if isinstance(store, str) else store[i]]
        spec |= {"key_dim": k * spec["key_dim"], "value_dim": v * spec["value_dim"]}
    described = manifest(kind, length, layers, stored)
    if not isinstance(store, str):
        described |= {"store": MIXED, "stores": store}
    elif store != "native" or draw(st.booleans()):
        described["store"] = store
    printable = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\")
    described["x_extra"] = draw(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63) + 1, 2**63 - 1)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(printable, max_size=9),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(printable, max_size=5), inner, max_size=3)
            ),
            max_leaves=8,
        )
    )
    described["source"]["name"] = draw(
        st.text(printable, min_size=1, max_size=20).filter(lambda name: name not in (".", ".."))
    )
    return described, tensors(kind, length, layers, stored, dtype, draw(st.booleans()), store)
