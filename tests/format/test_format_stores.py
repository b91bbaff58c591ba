"""Stores of codes: what a file of each looks like, which version and features it states, and what
its bytes mean, computed one by one by the generator of the examples."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from decoding import unpacked
from format_samples import VECTORS, layer, manifest, tensors

from amcli.storage.artifacts import Artifact
from amkv_format import (
    GROUP,
    MIXED,
    PACKED,
    STORES,
    VERSION,
    AmkvFile,
    FormatError,
    TensorSpec,
    write_file,
)
from amkv_format.manifest import FEATURES, check_manifest

OLDER = "903eb15d46bb7c8126484f2271f2de0b6d0cb052e0eeb66da1eb46618458d84e"
"""Over the digests of the good examples from before version 1.4; no change may reach them."""

INDEX = json.loads((VECTORS / "vectors.json").read_text(encoding="utf-8"))
SPEC = (VECTORS.parent / "amkv-v1.md").read_text(encoding="utf-8")


def made(
    path: Path, store: str | list[str], stored: list[list[int]] | None = None, length: int = 8
) -> AmkvFile:
    """A file of a full layer and a sliding one."""
    layers = [layer("full", 2, 8, 16), layer("sliding", 1, 8, 8)]
    stored = stored or [[1, 3], [3]]
    described = manifest("compact", length, layers, stored)
    described |= {"store": store} if isinstance(store, str) else {"store": MIXED, "stores": store}
    contents = tensors("compact", length, layers, stored, extras=False, store=store)
    write_file(path, described, contents)
    file = AmkvFile.open(path)
    file.verify()
    return file


@pytest.mark.parametrize("store", PACKED)
def test_the_bytes_of_a_packed_store(store: str, tmp_path: Path) -> None:
    key_bits, value_bits = PACKED[store]
    with made(tmp_path / "f.amkv", store, [[0, GROUP + 1], [3]], GROUP + 6) as file:
        assert (file.store, file.layers[0].store, file.layers[1].store) == (store, store, "native")
        assert file.manifest["features_required"] == ["store-packed"]
        assert file.manifest["version"] == "1.4"
        found = {name: (t.dtype, t.shape) for name, t in file.tensors.items()}
        rows = GROUP + 1
        assert found["layers.0.keys"] == ("U8", (rows, key_bits))  # 8 numbers
        assert found["layers.0.keys.scale"] == ("F16", (2, 8))
        assert found["layers.0.keys.zero"] == ("F16", (2, 8))
        assert found["layers.0.values"] == ("U8", (rows, 2 * value_bits))
        assert found["layers.0.values.scale"] == ("F16", (rows, 1))
        stored = rows * (key_bits + 2 * value_bits + 2) + 2 * 8 * 4
        full = (GROUP + 6) * 2 * 24 * 2
        assert file.ratio == file.manifest["ratio"] == full / stored
        assert file.full_bytes == full + 3 * 16 * 2


def test_a_store_for_each_layer(tmp_path: Path) -> None:
    with made(tmp_path / "f.amkv", ["int8", "k3v2"]) as file:
        assert (file.store, [x.store for x in file.layers]) == (MIXED, ["int8", "k3v2"])
        assert file.tensors["layers.1.keys"].shape == (3, 3)
        assert file.manifest["version"] == "1.4"
        features = ["store-int8", "store-packed", "store-mixed"]
        assert file.manifest["features_required"] == features
        assert file.full_bytes == 8 * 2 * 24 * 2 + 3 * 16 * 2
    with made(tmp_path / "g.amkv", ["native", "native"]) as file:
        assert file.manifest["features_required"] == ["store-mixed"]


@pytest.mark.parametrize("store", [name for name in STORES if name not in PACKED])
def test_files_of_older_stores_state_an_older_version(store: str, tmp_path: Path) -> None:
    with made(tmp_path / "f.amkv", store) as file:
        assert file.manifest["version"] == "1.3"
        assert file.manifest["features_required"] == [f"store-{store}"] * (store != "native")


def test_older_examples_are_what_they_were() -> None:
    older = [e for e in INDEX["good"] if e["manifest"]["version"] != "1.4"]
    assert len(older) == 24
    digests = "".join(f"{e['file']} {e['sha256']}\n" for e in older)
    assert hashlib.sha256(digests.encode()).hexdigest() == OLDER


def test_a_refusal_names_the_feature_and_the_version_to_look_for() -> None:
    described = next(e for e in INDEX["good"] if e["file"] == "good/store-k4v4-groups.amkv")
    check_manifest(described["manifest"])
    newer = described["manifest"] | {"version": "1.17", "features_required": ["store-trellis"]}
    with pytest.raises(FormatError) as caught:
        check_manifest(newer)
    assert caught.value.code == "feature-unsupported"
    for part in ("'store-trellis'", "1.17", VERSION):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("stores", "code"),
    [
        ("k4v4", "field-type"),
        (["k4v4"], "field-conflict"),
        (["k4v4", None], "field-type"),
        (["k4v4", MIXED], "field-value"),
        ([["k4v4"], "native"], "field-type"),
        ({"0": "k4v4"}, "field-type"),
    ],
)
def test_the_writer_refuses_wrong_lists_of_stores(stores: Any, code: str, tmp_path: Path) -> None:
    layers = [layer("full", 2, 8, 16), layer("sliding", 1, 8, 8)]
    described = manifest("compact", 8, layers, [[1, 3], [3]]) | {"store": MIXED, "stores": stores}
    contents = tensors("compact", 8, layers, [[1, 3], [3]], store=["k4v4", "native"])
    with pytest.raises(FormatError) as caught:
        write_file(tmp_path / "f.amkv", described, contents)
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_counts_at_the_limits_are_compared_without_wrapping(tmp_path: Path) -> None:
    length, heads = 2**31 - 1, 4096
    layers = [layer("full", heads, 65536, 65536)]
    described = manifest("compact", length, layers, [[length] * heads]) | {"store": "k8v8"}
    contents = [(TensorSpec("token_ids", "I32", (0,)), b"")]
    for part in ("keys", "keys.scale", "keys.zero", "values", "values.scale"):
        dtype = "U8" if part in ("keys", "values") else "F16"
        contents.append((TensorSpec(f"layers.0.{part}", dtype, (0, 65536)), b""))
    with pytest.raises(FormatError, match=r"tensor-mismatch: .* \[2147483647\]"):
        write_file(tmp_path / "f.amkv", described, contents)
    contents[0] = (TensorSpec("token_ids", "I32", (1,)), bytes(4))
    described |= {"logical_length": 1, "document_end": 1, "stored": [[1] * heads]}
    with pytest.raises(FormatError, match=rf"layers\.0\.keys has .* says \[{heads}, 65536\]"):
        write_file(tmp_path / "f.amkv", described, contents)


def test_features_and_stores_as_specified() -> None:
    section = SPEC[SPEC.index("## 9.") : SPEC.index("## 10.")]
    table = re.findall(r"^\| (`[^|]+) \| 1\.(\d) \|$", section, flags=re.MULTILINE)
    stated = {name: int(minor) for cell, minor in table for name in re.findall("`(.+?)`", cell)}
    assert stated == dict(FEATURES)
    assert {feature for feature in STORES.values() if feature} < set(FEATURES)


def test_the_example_of_planes_in_the_specification() -> None:
    found = re.search(r"the codes ([\d, ]+) of 3 bits are the bytes `([0-9a-f ]+)`", SPEC)
    assert found is not None
    codes = [int(code) for code in found[1].split(", ")]
    assert unpacked(bytes.fromhex(found[2]), 3) == codes


@pytest.mark.parametrize("entry", INDEX["good"], ids=lambda entry: entry["file"])
def test_entries_mean_what_the_generator_says(entry: dict[str, Any]) -> None:
    with Artifact.open(VECTORS / entry["file"]) as artifact:
        for i in range(len(artifact.layers)):
            heads = artifact.heads(i)
            for part, x in (("keys", heads.keys), ("values", heads.values)):
                raw = x.unpack().float().contiguous().numpy().tobytes()
                assert hashlib.sha256(raw).hexdigest() == entry["entries"][f"layers.{i}.{part}"]
