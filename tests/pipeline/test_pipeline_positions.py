"""`--positions`: entries say where they come from, and their bytes are counted."""

from __future__ import annotations

from pathlib import Path

import boxes
import pytest
import torch

from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import live_keys
from amcli.pipeline.contexts.reading import prefill
from amcli.storage.artifacts import Artifact
from amkv_format import AmkvFile


@pytest.mark.parametrize("store", ["native", "int8"])
def test_each_entry_is_the_key_of_the_token_it_names(store: str, tmp_path: Path) -> None:
    context = prefill(boxes.model("gemma3_text"), boxes.source())
    options = Request(ratio=3, method="highest-attention", store=store, positions=True)
    made = compact(context, options, errors=False)
    manifest = made.save(tmp_path / "f.amkv", overwrite=False)
    assert made.stored_bytes <= made.full_bytes / 3
    assert manifest["ratio"] == pytest.approx(made.ratio)
    with AmkvFile.open(tmp_path / "f.amkv") as file, Artifact.open(tmp_path / "f.amkv") as artifact:
        file.verify()
        assert file.ratio == pytest.approx(made.ratio)
        for i, layer in enumerate(file.layers):
            places = file.positions(i)
            if layer.type == "sliding":
                assert places is None
                continue
            assert places is not None
            K, _ = live_keys(context, i)
            rows = torch.tensor(list(places)).split(layer.stored)
            for h, (keys, _, _) in enumerate(artifact.heads(i).unpack().heads()):
                error = (keys - K[h, rows[h]]).norm() / keys.norm()
                assert error < (1e-6 if store == "native" else 0.02)


def test_without_them_a_file_has_more_entries(tmp_path: Path) -> None:
    context = prefill(boxes.model("llama"), boxes.source())
    rows = []
    for positions in (False, True):
        options = Request(ratio=10, method="highest-attention", positions=positions)
        made = compact(context, options, errors=False)
        assert 9.9 < made.ratio < 10.5
        rows.append(sum(sum(heads.lengths) for heads in made.layers))
        assert bool(made.positions) == positions
    assert rows[1] < rows[0]
