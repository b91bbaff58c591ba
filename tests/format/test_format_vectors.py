"""The example files: every good one opens with the contents the index states, every bad one is
refused for the stated reason, and their bytes are what the generator makes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import pytest
from format_samples import VECTORS

from amkv_format import AmkvFile, Code, FormatError

INDEX = json.loads((VECTORS / "vectors.json").read_text(encoding="utf-8"))

# Too large to be checked in; test_format_reader.py makes them on the spot.
NOT_IN_VECTORS = {"not-regular-file", "too-many-tensors", "json-too-large", "manifest-too-large"}


def ids(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["file"] for entry in entries]


@pytest.mark.parametrize("entry", INDEX["good"], ids=ids(INDEX["good"]))
def test_good_files_open_with_the_contents_they_claim(entry: dict[str, Any]) -> None:
    path = VECTORS / entry["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    with AmkvFile.open(path) as file:
        file.verify()
        assert file.manifest == entry["manifest"]
        assert file.payload_hash() == entry["manifest"]["payload_hash"]
        seen = {
            name: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "sha256": hashlib.sha256(file.read(name)).hexdigest(),
            }
            for name, info in file.tensors.items()
        }
        assert seen == entry["tensors"]


@pytest.mark.parametrize("entry", INDEX["bad"], ids=ids(INDEX["bad"]))
def test_bad_files_are_refused_for_the_stated_reason(entry: dict[str, Any]) -> None:
    path = VECTORS / entry["file"]
    if entry["refused_by"] == "open":
        with pytest.raises(FormatError) as caught:
            AmkvFile.open(path)
    else:
        with AmkvFile.open(path) as file, pytest.raises(FormatError) as caught:
            file.verify()
    assert caught.value.code == entry["code"], str(caught.value)
    # A vector that is wrong elsewhere than it says would prove nothing.
    if (
        entry["code"] in ("field-type", "field-value", "field-missing")
        and " is " in entry["reason"]
    ):
        field = entry["reason"].split(" is ")[0].split(".")[-1]
        assert field in caught.value.message


def test_every_code_has_a_bad_file() -> None:
    assert {entry["code"] for entry in INDEX["bad"]} == set(Code) - NOT_IN_VECTORS


def test_files_in_the_repository_are_what_the_generator_makes() -> None:
    command = [sys.executable, str(VECTORS / "make_vectors.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_payload_hash_does_not_depend_on_tensor_order_and_padding() -> None:
    with (
        AmkvFile.open(VECTORS / "good/prefill-f32.amkv") as one,
        AmkvFile.open(VECTORS / "good/other-order.amkv") as other,
    ):
        assert list(one.tensors) != list(other.tensors)
        assert one.payload_hash() == other.payload_hash()
