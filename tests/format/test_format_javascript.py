"""A second reader, in JavaScript and written from the specification's text alone, says the same.

It needs Node 20 or newer and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from building import layer
from decoding import entries
from format_mutations import corpus, mutated
from format_samples import VECTORS
from good_packed import packed
from test_format_reader import framed

from amkv_format import PACKED, AmkvFile, FormatError, canonical_json, limits

READER = Path(__file__).parent / "js" / "reader.mjs"
INDEX = json.loads((VECTORS / "vectors.json").read_text(encoding="utf-8"))


def node_version() -> int:
    """Node's major version; 0 where there is none."""
    node = shutil.which("node")
    if node is None:
        return 0
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=True)
    return int(said.stdout.strip().removeprefix("v").partition(".")[0])


pytestmark = pytest.mark.skipif(
    node_version() < 20, reason="the second reader needs Node 20 or newer on the PATH"
)


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What the second reader says of files, in their order."""
    command = ["node", str(READER), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_it_reads_the_good_examples() -> None:
    paths = [VECTORS / entry["file"] for entry in INDEX["good"]]
    for entry, path, found in zip(INDEX["good"], paths, read(paths), strict=True):
        assert "code" not in found, found
        with AmkvFile.open(path) as file:
            assert found["ratio"] == pytest.approx(file.ratio, rel=1e-12)
            assert found["manifest"] == canonical_json(file.manifest)
        assert found["tensors"] == entry["tensors"]
        assert found["payload_hash"] == entry["manifest"]["payload_hash"]
        assert found["entries"] == entry["entries"]


def test_it_decodes_packed_stores_of_any_shape(tmp_path: Path) -> None:
    random = Random(20261127)
    paths, wanted = [], []
    for n, store in enumerate([*PACKED] * 2):
        heads, dims = random.randint(1, 3), [8 * random.randint(1, 20) for _ in "kv"]
        stored = [random.choice((0, 1, 63, 64, 65, random.randint(2, 200))) for _ in range(heads)]
        stored[0] += 1
        it = packed(store, [stored], [layer("full", heads, *dims, None)], T=201)
        paths.append(tmp_path / f"{n}.amkv")
        paths[-1].write_bytes(it.file())
        wanted.append(entries(it))
    assert [found.get("entries", found) for found in read(paths)] == wanted


def test_it_refuses_the_bad_examples_for_the_same_reason() -> None:
    found = read([VECTORS / entry["file"] for entry in INDEX["bad"]])
    wanted = [(entry["file"], entry["code"], entry["refused_by"]) for entry in INDEX["bad"]]
    seen = [
        (entry["file"], said.get("code"), said.get("stage"))
        for entry, said in zip(INDEX["bad"], found, strict=True)
    ]
    assert seen == wanted


def test_it_refuses_what_is_too_large_for_an_example(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    many = ",".join(f'"ext.{i}":{entry}' for i in range(limits.MAX_TENSORS + 1))
    long = '{"x":"' + "é" * (limits.MAX_MANIFEST_BYTES // 2) + '"}'
    cases = {
        "too-many-tensors": '{"__metadata__":{"amkv":"{}"},' + many + "}",
        "json-too-large": '{"x":[' + "1," * limits.MAX_JSON_SEPARATORS + "1]}",
        "manifest-too-large": canonical_json({"__metadata__": {"amkv": long}}),
    }
    for code, header in cases.items():
        (tmp_path / code).write_bytes(framed(header))
    os.mkdir(tmp_path / "not-regular-file")
    codes = [*cases, "not-regular-file"]
    assert [found["code"] for found in read([tmp_path / code for code in codes])] == codes


def test_both_readers_agree_on_damaged_files(tmp_path: Path) -> None:
    random = Random(20260217)
    files = corpus()
    paths = []
    for n in range(400):
        path = tmp_path / f"{n}.amkv"
        path.write_bytes(mutated(files, random).data)
        paths.append(path)
    for path, found in zip(paths, read(paths), strict=True):
        assert ("code" in found) == refused(path), (found, path.read_bytes())


def refused(path: Path) -> bool:
    try:
        with AmkvFile.open(path) as file:
            file.verify()
    except FormatError:
        return True
    return False
