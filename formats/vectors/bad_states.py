"""The files with states of layers that every reader has to refuse, each wrong in one way."""

from __future__ import annotations

from collections.abc import Iterator

from building import Example, compact, hybrid


def bad_states() -> Iterator[tuple[str, str, str, Example | bytes]]:
    """States that do not fit the manifest, or the manifest itself."""
    it = hybrid()
    it.manifest["features_required"] = []
    yield "states-without-feature", "states that no feature announces", "field-conflict", it
    it = compact()
    it.manifest |= {"version": "1.2", "features_required": ["states"]}
    yield "feature-without-states", "the feature, and no state", "field-conflict", it
    it = hybrid()
    it.manifest["states"] = []
    yield "states-none", "an empty list of states", "field-value", it
    it = hybrid()
    it.manifest["states"][1] = dict(it.manifest["states"][0])
    yield "states-twice", "the same state of the same layer, twice", "field-conflict", it
    it = hybrid()
    it.manifest["states"][0]["layer"] = -1
    yield "states-layer", "a state of layer -1", "field-value", it
    it = hybrid()
    del it.manifest["states"][0]["name"]
    yield "states-no-name", "a state without a name", "field-missing", it
    it = hybrid()
    del it.tensors["states.2"]
    yield "states-missing", "a state without its tensor", "tensor-missing", it
    it = hybrid()
    it.tensors["states.3"] = ("F32", [1], b"\0\0\0\0")
    it.tensors = dict(sorted(it.tensors.items(), key=lambda t: t[1][0] == "F16"))
    yield "states-unlisted", "a tensor of a state that is not listed", "tensor-unexpected", it
    it = hybrid()
    it.tensors["states.1"] = ("I32", *it.tensors["states.1"][1:])
    yield "states-integers", "a state of integers", "tensor-mismatch", it


def bad_numbers() -> Iterator[tuple[str, str, str, Example | bytes]]:
    """States that open; only `verify` finds what is wrong."""
    it = hybrid()
    it.tensors["states.2"] = ("F32", [1], b"\0\0\xc0\x7f")
    yield "states-nan", "a state that is no number", "not-finite", it
