"""export and import as they are typed, and the records that they print."""

from __future__ import annotations

import json
from pathlib import Path

from helptext import documented
from safetensors.torch import save_file

from amcli.storage.artifacts import Artifact
from conftest import Amkv


def test_out_and_in_again(amkv: Amkv, full: Path, here: Path) -> None:
    exported = amkv("export", full, "-o", "folder", "--json")
    assert exported.code == 0
    assert set(json.loads(exported.out)) == documented("export")
    assert sorted(x.name for x in (here / "folder").iterdir()) == [
        "cache.safetensors", "context.json", "loader.py",
    ]  # fmt: skip
    assert {x.stat().st_mode & 0o777 for x in (here / "folder").iterdir()} == {
        full.stat().st_mode & 0o777
    }

    tensors = {}
    with Artifact.open(full) as artifact:
        for i, layer in enumerate(artifact.layers):
            heads, shape = artifact.heads(i).unpack(), (1, layer.kv_heads, artifact.logical_length)
            tensors[f"{i}.keys"] = heads.keys.unpack().view(*shape, -1)
            tensors[f"{i}.values"] = heads.values.unpack().view(*shape, -1)
        wanted = artifact.manifest
    save_file(tensors, "cache.safetensors")
    words = ("import", "cache.safetensors", "--model", "pocket", "--text", "doc.txt")
    imported = amkv(*words, "-o", "again.amkv", "--json")
    assert imported.code == 0
    assert set(json.loads(imported.out)) == documented("import")
    with Artifact.open("again.amkv") as artifact:
        assert artifact.manifest["payload_hash"] == wanted["payload_hash"]
        assert artifact.manifest["boundary"] == wanted["boundary"]
    refused = amkv(*words, "-o", "again.amkv")
    assert (refused.code, "already exists" in refused.errors[0]) == (2, True)
    assert amkv(*words, "-o", "cache.safetensors", "--force").code == 2  # it is the source


def test_without_a_command_line_that_makes_sense(amkv: Amkv, compact: Path) -> None:
    for words, message in (
        (("export",), "missing argument 'FILE'"),
        (("export", "no.amkv"), "no such file: no.amkv"),
        (("export", "doc.txt"), "doc.txt is not an .amkv file"),
        (("import",), "missing argument 'CACHE'"),
        (("verify",), "missing argument 'FILE"),
    ):
        done = amkv(*words)
        assert done.code in (2, 3)
        assert done.out == ""
        assert message in done.errors[0]
