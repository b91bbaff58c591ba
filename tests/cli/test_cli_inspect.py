"""inspect: what it says of real artifacts and of every valid example file, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helptext import documented

from amkv_format import AmkvFile
from conftest import Amkv

ROOT = Path(__file__).parents[2]
GOOD = sorted((ROOT / "formats" / "vectors" / "good").glob("*.amkv"))
INDEX = json.loads((ROOT / "formats" / "vectors" / "vectors.json").read_text(encoding="utf-8"))
BAD = sorted((ROOT / "formats" / "vectors" / "bad").glob("*.amkv"))


def test_the_documented_fields_are_those_that_are_printed(amkv: Amkv, full: Path) -> None:
    prefill = json.loads(amkv("prefill", "doc.txt", "-f", "--json").out)
    compact = json.loads(amkv("compact", full, "--json", "--method", "keep").out)
    chat = json.loads(amkv("chat", "-c", "doc.amkv", "-p", "Who?", "--json").out)
    inspect = json.loads(amkv("inspect", "doc.amkv", "--json").out)
    for name, record in (
        ("prefill", prefill),
        ("compact", compact),
        ("chat", {**chat, "given": None, "whole": None, "thoughts": None}),
        ("inspect", inspect),
    ):
        assert set(record) == documented(name), name


def test_a_compact_artifact(amkv: Amkv, full: Path) -> None:
    made = json.loads(amkv("compact", full, "--ratio", "4", "--json").out)
    record = json.loads(amkv("inspect", "doc.amkv", "--json").out)
    for name in ("ratio", "method", "budget", "queries", "seed", "requested", "fit_errors"):
        assert record[name] == made[name], name
    assert record["stored_per_head"] == made["stored_per_head"]
    assert record["model"]["id"] == "pocket"
    with AmkvFile.open("doc.amkv") as file:
        assert record["payload_hash"] == file.payload_hash()
        assert [layer["stored"] for layer in record["layers"]] == file.manifest["stored"]

    assert len(amkv("inspect", "doc.amkv").out.splitlines()) <= 10  # ten seconds
    text = amkv("inspect", "doc.amkv", "--layers").out
    assert max(map(len, text.splitlines())) <= 80
    for shown in ("doc.txt", "pocket", "by omp, budget adaptive", "asked for ratio 4"):
        assert shown in text
    assert file.manifest["payload_hash"].removeprefix("sha256:") in text
    table = text.partition("\nlayer")[2].splitlines()
    assert len(table) == 1 + len(record["layers"])
    first = record["layers"][0]["stored"]
    assert table[1].split()[3:6:2] == [f"{min(first):,}", f"{max(first):,}"]


def test_a_prefill_artifact(amkv: Amkv, full: Path) -> None:
    text = amkv("inspect", full).out
    assert "holds     every key and value" in text
    assert "made" not in text


def test_neither_torch_nor_a_model_is_needed(
    here: Path, compact: Path, environment: dict[str, str]
) -> None:
    code = (
        "import sys; from amcli.commands.app import main; code = main(['inspect', 'doc.amkv']);"
        "sys.exit('torch' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_every_valid_example_can_be_inspected(amkv: Amkv, path: Path) -> None:
    text = amkv("inspect", path)
    assert (text.code, text.err) == (0, "")
    assert json.loads(amkv("inspect", path, "--json").out)["kind"] in ("prefill", "compact")


def test_no_invalid_example_gets_past_opening_with_anything_but_exit_code_3(amkv: Amkv) -> None:
    codes = {path.stem: amkv("inspect", path).code for path in BAD}
    # What only reading the whole payload shows is left to verify.
    left = {Path(x["file"]).stem for x in INDEX["bad"] if x["refused_by"] == "verify"}
    assert {name for name, code in codes.items() if code == 0} <= left
    assert set(codes.values()) <= {0, 3}
