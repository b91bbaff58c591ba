"""A document longer than the model was made for is read, and every command warns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from amcli.pocket import folder as pocket_folder
from amcli.storage.artifacts import Artifact
from conftest import Amkv


def test_beyond_the_trained_length_every_command_warns(amkv: Amkv, here: Path) -> None:
    shutil.copytree(pocket_folder(), here / "model")
    path = here / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": 128}))
    done = amkv("prefill", "doc.txt", "--model", "model")
    with Artifact.open("doc.prefill.amkv") as artifact:
        tokens = artifact.logical_length
    assert tokens > 128
    warning = f"warning: the context has {tokens} tokens, and the model was made for 128"
    compacted = amkv("compact", "doc.prefill.amkv", "--method", "keep", "-o", "doc.amkv")
    asked = amkv("chat", "--context", "doc.amkv", "-p", "Who lives here?", "--max-tokens", "1")
    for result in (done, compacted, asked):
        assert result.code == 0
        assert result.err.count(warning) == 1
        assert "warning" not in result.out


def test_within_it_none_does(amkv: Amkv, full: Path) -> None:
    asked = amkv("chat", "--context", full, "-p", "Who lives here?", "--max-tokens", "1")
    assert asked.code == 0
    assert "warning" not in asked.err
