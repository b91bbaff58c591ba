"""--save-budget and --budget FILE: one document's budget for the next one."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from amkv_format import AmkvFile
from conftest import Amkv

FAST = ("--method", "highest-attention")


def stored(path: str) -> list[list[int]]:
    with AmkvFile.open(path) as file:
        return [list(layer.stored) for layer in file.layers]


def test_a_budget_goes_to_a_file_and_back(amkv: Amkv, full: Path) -> None:
    done = amkv("compact", full, "--ratio", "10", "--save-budget", "b.json", "--json", *FAST)
    first = json.loads(done.out)
    assert first["saved_budget"] == "b.json"
    assert "budget written to b.json" in done.err
    again = amkv("compact", full, "--ratio", "10", "--budget", "b.json", "-o", "a.amkv", "--json",
                 *FAST)  # fmt: skip
    second = json.loads(again.out)
    assert (second["budget"], second["budget_file"]) == ("file", "b.json")
    assert stored("a.amkv") == stored("doc.amkv")
    assert second["stored_bytes"] == first["stored_bytes"]
    with AmkvFile.open("a.amkv") as file:
        assert file.manifest["budget"]["name"] == "file"
        assert file.manifest["budget"]["file"] == "b.json"


def test_the_file_says_what_made_it(amkv: Amkv, full: Path) -> None:
    made = json.loads(amkv("compact", full, "--save-budget", "b.json", "--json", *FAST).out)
    record = json.loads(Path("b.json").read_text(encoding="utf-8"))
    with AmkvFile.open("doc.amkv") as file:
        manifest = file.manifest
    assert (record["format"], record["version"]) == ("amkv-budget", 1)
    assert [layer["entries"] for layer in record["layers"]] == manifest["stored"]
    total = sum(map(sum, manifest["stored"]))
    for layer in record["layers"]:
        assert layer["shares"] == pytest.approx([t / total for t in layer["entries"]])
    assert record["source"]["sha256"] == manifest["source"]["sha256"]
    for name in ("id", "architecture", "config_hash"):
        assert record["model"][name] == manifest["model"][name]
    assert (record["method"], record["ratio"]) == ("highest-attention", made["ratio"])
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    section = text.partition("## Budget files")[2].partition("\n## ")[0]
    for name in (*record, *record["layers"][0]):
        assert f"`{name}`" in section, name


def test_shares_scale_to_another_document_and_ratio(amkv: Amkv, here: Path, full: Path) -> None:
    amkv("compact", full, "--ratio", "8", "--save-budget", "b.json", *FAST)
    first = stored("doc.amkv")
    text = (here / "doc.txt").read_text(encoding="utf-8")
    (here / "other.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    words = ("--ratio", "4", "--store", "native", "--budget", "b.json", "--json", *FAST)
    done = amkv("compact", "other.txt", *words)
    record = json.loads(done.out)
    assert 4 <= record["ratio"] < 4.1
    pairs = [(a, b) for x, y in zip(first, stored("other.amkv"), strict=True)
             for a, b in zip(x, y, strict=True)]  # fmt: skip
    largest = max(pairs)
    assert largest[1] == max(b for _, b in pairs) <= record["tokens"]
    assert min(b for _, b in pairs) >= 4
    order = sorted(pairs)
    assert all(x[1] <= y[1] for x, y in pairwise(order) if x[0] < y[0])


def test_a_name_wins_over_a_file_of_that_name(amkv: Amkv, full: Path) -> None:
    amkv("compact", full, "--ratio", "8", "--save-budget", "uniform", *FAST)
    by_name = amkv("compact", full, "--budget", "uniform", "-f", "--json", *FAST)
    assert json.loads(by_name.out)["budget_file"] is None
    by_path = amkv("compact", full, "--budget", "./uniform", "-f", "--json", *FAST)
    assert json.loads(by_path.out)["budget"] == "file"


def test_bad_files_are_one_line_and_nothing_is_written(amkv: Amkv, here: Path, full: Path) -> None:
    amkv("compact", full, "--ratio", "8", "--save-budget", "b.json", *FAST)
    good = json.loads((here / "b.json").read_text(encoding="utf-8"))
    (here / "text.json").write_text("hello", encoding="utf-8")
    (here / "later.json").write_text(json.dumps(good | {"version": 9}), encoding="utf-8")
    other = good | {"layers": good["layers"][:3]}
    (here / "other.json").write_text(json.dumps(other), encoding="utf-8")
    before = sorted(os.listdir(here))
    for name, code, message in (
        ("no.json", 2, "unknown budget 'no.json': no such name, and no such file"),
        ("text.json", 2, "text.json is not a budget file"),
        ("later.json", 2, "later.json is a budget file of version 9; this amkv reads version 1"),
        ("other.json", 4, "does not fit pocket: the file has 3 layers of 2 KV heads, the model 9"),
    ):
        done = amkv("compact", full, "--budget", name, "-o", "out.amkv", *FAST)
        assert done.code == code, name
        assert len(done.errors) == 2
        assert message in done.errors[0]
    assert sorted(os.listdir(here)) == before


def test_budget_files_are_replaced_only_by_force(amkv: Amkv, here: Path, full: Path) -> None:
    (here / "b.json").write_text("mine", encoding="utf-8")
    words = ("compact", full, "--save-budget", "b.json", *FAST)
    done = amkv(*words)
    assert done.code == 2
    assert done.errors[0] == "error: b.json already exists"
    assert (here / "b.json").read_text(encoding="utf-8") == "mine"
    assert not (here / "doc.amkv").exists()
    assert amkv(*words, "--force").code == 0
    assert json.loads((here / "b.json").read_text(encoding="utf-8"))["format"] == "amkv-budget"


@pytest.mark.parametrize("budget", ["doc.amkv", "./doc.amkv", "doc.prefill.amkv"])
def test_a_budget_never_takes_the_place_of_what_else_is_there(
    amkv: Amkv, here: Path, full: Path, budget: str
) -> None:
    before = full.read_bytes()
    done = amkv("compact", full, "--save-budget", budget, "--force", *FAST)
    assert done.code == 2
    assert full.read_bytes() == before
    assert not (here / "doc.amkv").exists()


def test_eval_takes_a_budget_file(amkv: Amkv, full: Path) -> None:
    amkv("compact", full, "--ratio", "8", "--save-budget", "b.json", *FAST)
    words = ("eval", "--docs", "1", "--questions", "2", "--tokens", "200", "--ratio", "5", *FAST)
    record = json.loads(amkv(*words, "--budget", "b.json", "--json").out)
    assert {row["budget"] for row in record["rows"] if row["ratio"]} == {"file"}
