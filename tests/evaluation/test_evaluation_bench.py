"""`amkv bench`: stages add up, shares are of what was measured, and shapes are what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from amcli.commands.app import main
from amcli.commands.options import size
from amcli.errors import UsageError
from amcli.models.shapes import SHAPES, shaped

JSON = Path(__file__).parents[2] / "docs" / "json.md"
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 5000}


def test_every_stage_is_timed_and_the_fields_are_the_documented_ones(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["bench", "--tokens", "150", "--ratio", "8", "--repeats", "1", "--device", "cpu"]
    assert main([*words, "--json", "-o", str(tmp_path / "b.json")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "b.json").read_text())
    section = JSON.read_text().split("## `amkv bench --json`")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.M)
    assert set(record) == set(re.findall(r"`(\w+)`", " ".join(rows)))
    stages = {stage["stage"]: stage for stage in record["stages"]}
    assert list(stages) == ["prefill", "reference", "compact", "errors", "write", "load"]
    for name in ("prefill", "reference", "compact"):
        stage = stages[name]
        rate = stage["flop"] / stage["seconds"]
        assert stage["flop_per_s"] == pytest.approx(rate, rel=0.1)
        share = rate / record["ceilings"]["product"]
        assert stage["share_of_product"] == pytest.approx(share, rel=0.1)
    after = sum(s["seconds"] for name, s in stages.items() if name not in ("prefill", "load"))
    assert record["after_prefill"] == pytest.approx(after, abs=0.01)
    assert record["ratio"] >= 8
    # What the prefill has to do at least: a multiply-add for each weight and token.
    assert stages["prefill"]["flop"] > 2 * 5e6 * record["tokens"]


def test_a_shape_has_the_real_dimensions_and_makes_words() -> None:
    for name, (_, fields) in SHAPES.items():
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        loaded = shaped(name, device="cpu", **SMALL, **heads)
        layer = loaded.geometry.layers[0]
        assert (layer.kv_heads, layer.key_dim) == (2, fields["head_dim"])
        logits = loaded.model(torch.tensor([[5, 6, 7]])).logits[0, -1]
        assert loaded.tokenizer.decode([int(logits.argmax())]).strip()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "qwen3"], "unknown shape 'qwen3'"),
        (["--layers", "2"], "--layers is for a --shape"),
        (["--shape", "qwen3-4b", "--model", "pocket"], "--shape and --model exclude each other"),
        (["--tokens", "200", "--ratio", "900"], "--ratio 900 is more than the context has tokens"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_makes_no_sense_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_amounts_of_memory() -> None:
    read = size("--memory-limit", "8GB")
    assert [read(x) for x in ("8GB", "1.5 g", "500M", "2048", "1KiB", "2GiB")] == [
        8 * 10**9, 15 * 10**8, 5 * 10**8, 2048, 1024, 2 << 30,
    ]  # fmt: skip
    for wrong in ("", "lots", "-1G", "nan", "0"):
        with pytest.raises(UsageError, match="is no amount of memory"):
            read(wrong)


def test_less_memory_changes_nothing_but_time(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Groups are smaller; every head comes out as it does among all."""
    (tmp_path / "doc.txt").write_text("One fact a line. " * 40)
    made = []
    for limit in ("1M", "4GB"):
        path = str(tmp_path / f"{limit}.amkv")
        words = ["compact", str(tmp_path / "doc.txt"), "--ratio", "8", "--memory-limit", limit]
        assert main([*words, "--model", "pocket", "-q", "-o", path, "--json"]) == 0
        made.append(json.loads(capsys.readouterr().out))
    assert made[0]["stored_per_head"] == made[1]["stored_per_head"]
    assert made[0]["stored_bytes"] == made[1]["stored_bytes"]
