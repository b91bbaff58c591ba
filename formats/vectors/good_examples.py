"""The files that every reader has to accept."""

from __future__ import annotations

from collections.abc import Iterator

from building import (
    FULL,
    SLIDING,
    Example,
    coded,
    compact,
    example,
    floats,
    hybrid,
    layer,
    prefill,
    recorded,
    told,
    worked,
)


def good_examples() -> Iterator[tuple[str, str, Example]]:
    """Name, what it shows, and the file."""
    yield "prefill-f32", "a prefill: a full layer and the tail of a sliding one", prefill()
    yield "prefill-bf16", "two-byte storage", prefill(dtype="BF16")
    yield "compact-f32", "ragged heads with beta and positions", compact()
    yield "compact-bf16", "two-byte storage; beta stays F32", compact(dtype="BF16")
    yield (
        "compact-f16-no-beta",
        "beta and positions left out",
        compact(dtype="F16", beta=False, positions=False),
    )
    yield (
        "compact-empty-head",
        "a head and a whole layer of which nothing is stored",
        example("compact", [[0, 2], [0, 0]], [FULL, FULL], beta=True),
    )
    yield (
        "compact-all-sliding",
        "no full layer: nothing to compact, ratio 1",
        example("compact", [[3]], [SLIDING]),
    )
    yield "one-token", "the shortest context", example("prefill", [[1, 1]], [FULL], T=1)
    yield (
        "sliding-whole-window",
        "a tail may hold the whole window",
        example("prefill", [[4]], [SLIDING]),
    )
    yield from good_variants()


def good_variants() -> Iterator[tuple[str, str, Example]]:
    """Freedoms that a reader has to grant."""
    it = compact()
    it.manifest |= {"version": "1.9", "x_note": {"kept": [True, None, "as it is"]}}
    it.tensors["ext.note"] = ("F32", [1], floats("F32", 1, 3))
    yield "minor-version", "a later minor version with unknown fields and an ext. tensor", it
    it = prefill()
    it.tensors = dict(reversed(it.tensors.items()))
    it.padding = 64
    yield "other-order", "tensors in another order, header padded; the hash is the same", it
    it = prefill()
    it.manifest["source"]["name"] = "übung 日本語 🐈.txt"
    yield "unicode-name", "a source name outside ASCII and outside the BMP", it
    it = compact()
    it.manifest["fit_errors"] = {"mass": [[0.125, 1e-07], []], "output": [[1, 0], [0]]}
    yield "fit-errors", "fit errors, an empty list for a layer that was not fitted", it
    it = prefill()
    it.manifest |= {"document_start": 2, "document_end": 5, "boundary": "in_user_turn"}
    it.manifest["tokenizer"]["template_hash"] = "sha256:" + "2" * 64
    yield "chat-template", "the document stands inside the first user turn", it
    yield "store-int8", "entries as bytes with scales, the sliding layer as it is", coded("int8")
    yield "store-int4", "two codes to a byte; keys are read back turned", coded("int4")
    wide = layer("full", 2, 80, 64, None)
    yield "store-int4-blocks", "blocks of 20 and of 32, keys turned by 16", coded("int4", wide)
    it = compact()
    it.manifest |= {"version": "1.1", "store": "native"}
    yield "store-native", "the store named, though it is the usual one", it
    it = example("compact", [[3]], [SLIDING])
    it.manifest |= {"version": "1.1", "store": "int8", "features_required": ["store-int8"]}
    yield "store-all-sliding", "a store of codes without a layer that has any", it
    yield (
        "recorded",
        "version 1.3: its own hash, and what amkv records of how it was made",
        recorded(),
    )
    yield "worked-example", "the example of the specification", worked()
    it = prefill()
    it.manifest["version"] = "1.3"
    yield "prefill-1-3", "a prefill of version 1.3", it
    yield "told", "version 1.4: configuration, weights and turns of the model", told()
    it = told()
    it.manifest["model"] |= {"config": {}, "weights": {}}
    yield "told-nothing", "neither configuration nor weights are known", it
    yield "states", "layers that keep a state beside those with keys and values", hybrid()
    it = hybrid()
    it.manifest["states"][2]["of_its_own"] = "ignored"
    it.manifest |= {"x_state": 1}
    yield "states-more-fields", "a state with a field that no reader knows", it
