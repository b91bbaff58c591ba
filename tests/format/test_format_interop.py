"""The files are safetensors files: the reference library reads ours, and we read its."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from format_samples import VECTORS, sample
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from amkv_format import AmkvFile, FormatError, canonical_json, write_file

INDEX = json.loads((VECTORS / "vectors.json").read_text(encoding="utf-8"))
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def as_tensor(file: AmkvFile, name: str) -> torch.Tensor:
    info = file.tensors[name]
    if not info.nbytes:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(bytearray(file.read(name)), dtype=DTYPES[info.dtype]).reshape(
        info.shape
    )


def assert_same(path: Path) -> None:
    with AmkvFile.open(path) as ours, safe_open(path, framework="pt") as theirs:
        assert theirs.metadata() == {"amkv": canonical_json(ours.manifest)}
        assert set(theirs.keys()) == set(ours.tensors)
        for name in ours.tensors:
            tensor = theirs.get_tensor(name)
            assert tensor.dtype == DTYPES[ours.tensors[name].dtype]
            assert torch.equal(tensor, as_tensor(ours, name))


@pytest.mark.parametrize("kind", ["prefill", "compact"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_the_library_reads_what_we_write(kind: str, dtype: str, tmp_path: Path) -> None:
    write_file(tmp_path / "f.amkv", *sample(kind, dtype))
    assert_same(tmp_path / "f.amkv")


@pytest.mark.parametrize("entry", INDEX["good"], ids=lambda entry: entry["file"])
def test_the_library_reads_the_good_examples(entry: dict[str, Any]) -> None:
    assert_same(VECTORS / entry["file"])


@pytest.mark.parametrize("kind", ["prefill", "compact"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_we_read_what_the_library_writes(kind: str, dtype: str, tmp_path: Path) -> None:
    manifest = write_file(tmp_path / "ours.amkv", *sample(kind, dtype))
    with AmkvFile.open(tmp_path / "ours.amkv") as file:
        tensors = {name: as_tensor(file, name) for name in file.tensors}
    save_file(tensors, tmp_path / "theirs.amkv", metadata={"amkv": canonical_json(manifest)})
    with AmkvFile.open(tmp_path / "theirs.amkv") as file:
        file.verify()  # the payload hash holds, whoever arranged the tensors
        assert file.manifest == manifest
        for name, tensor in tensors.items():
            assert torch.equal(as_tensor(file, name), tensor)


def test_we_accept_no_container_that_the_library_refuses() -> None:
    refused = []
    for entry in INDEX["bad"]:
        try:
            with safe_open(VECTORS / entry["file"], framework="pt"):
                pass
        except SafetensorError:
            refused.append(entry["file"])
            with pytest.raises(FormatError):
                AmkvFile.open(VECTORS / entry["file"])
    assert len(refused) > 15
