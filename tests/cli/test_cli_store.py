"""--store as it is typed, and what inspect and chat make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amcli.pipeline.compaction import carrying
from amkv_format import AmkvFile
from conftest import Amkv


@pytest.mark.parametrize("store", ["int8", "int4", "k4v4"])
def test_a_context_in_few_bits(amkv: Amkv, full: Path, store: str) -> None:
    words = ("--ratio", "8", "--queries", "repeat", "--json")
    native = json.loads(amkv("compact", full, *words, "--store", "native", "-o", "n.amkv").out)
    done = amkv("compact", full, *words, "--store", store)
    made = json.loads(done.out)
    assert (native["store"], made["store"]) == ("native", store)
    assert f", each number in {store}" in done.err
    assert made["ratio"] == pytest.approx(native["ratio"], rel=0.02)
    assert made["stored_per_head"]["mean"] > 2.5 * native["stored_per_head"]["mean"]
    with AmkvFile.open("doc.amkv") as file:
        file.verify()
        assert file.store == store
        inside = sum(t.nbytes for name, t in file.tensors.items() if name != "token_ids")
        assert made["stored_bytes"] == inside

    record = json.loads(amkv("inspect", "doc.amkv", "--json").out)
    for name in ("store", "ratio", "full_bytes", "stored_bytes"):
        assert record[name] == made[name], name
    text = amkv("inspect", "doc.amkv").out
    assert max(map(len, text.splitlines())) <= 80
    assert store in text
    answer = amkv("chat", "-c", "doc.amkv", "-p", "Where is it?")
    assert answer.code == 0
    assert answer.out.strip()


def test_left_out_it_is_decided(amkv: Amkv, full: Path) -> None:
    """4 bits where something has to go, 8 where all of it fits, and as ever for other methods."""
    for words, store, entries in (
        ((), "k4v4", None),
        (("--ratio", "2"), "k8v8", "all"),
        (("--ratio", "5"), "mixed", "all"),
        (("--ratio", "8", "--method", "knorm"), "native", None),
        (("--ratio", "8", "--method", "knorm", "--store", "auto"), "k4v4", None),
    ):
        made = json.loads(amkv("compact", full, *words, "--json", "--force").out)
        read = json.loads(amkv("inspect", "doc.amkv", "--json").out)
        assert made["store"] == read["store"] == store, words
        assert (made["stored_per_head"]["min"] == made["tokens"]) == (entries == "all"), words


def test_layers_in_stores_of_their_own(
    amkv: Amkv, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = {i: "k4v4" if i % 3 else "k8v8" for i in range(9)}
    changes = {i: 0.1 if i % 3 else 0.4 for i in range(9)}
    monkeypatch.setattr(carrying, "coarse_changes", lambda *_: changes)
    done = amkv("compact", full, "--ratio", "8", "--json")
    made = json.loads(done.out)
    assert made["store"] == "mixed"
    assert "  stored as k4v4 (6 layers), k8v8 (3)" in done.err
    record = json.loads(amkv("inspect", "doc.amkv", "--json").out)
    assert record["store"] == "mixed"
    assert [layer["store"] for layer in record["layers"]] == list(stores.values())
    text = amkv("inspect", "doc.amkv").out
    assert "in k4v4 (6 layers), k8v8 (3)" in text
    assert max(map(len, text.splitlines())) <= 80
    assert '"store": "mixed"' in amkv("list", ".", "--json").out
    amkv("compact", full, "--ratio", "8", "--store", "k4v4", "-o", "alike.amkv")
    differ = json.loads(amkv("diff", "doc.amkv", "alike.amkv", "--json").out)["differences"]
    assert differ["store"] == ["mixed", "k4v4"]
    assert amkv("verify", "doc.amkv").code == 0
    assert amkv("chat", "-c", "doc.amkv", "-p", "Where is it?").out.strip()


def test_a_store_that_there_is_not(amkv: Amkv, full: Path) -> None:
    done = amkv("compact", full, "--store", "int5")
    assert done.code == 2
    assert "unknown store 'int5'" in done.err
    assert "native, int8, int4" in done.err
    assert not Path("doc.amkv").exists()


def test_eval_measures_what_is_stored(amkv: Amkv) -> None:
    words = (
        "eval",
        "--docs",
        "1",
        "--questions",
        "2",
        "--tokens",
        "200",
        "--method",
        "keep,summary",
    )
    words += ("--ratio", "8", "--store", "int8", "-o", "r.json")
    record = json.loads(amkv(*words, "--json").out)
    assert record["settings"]["store"] == "int8"
    rows = {row["method"]: row for row in record["rows"] if row["kind"] == "all"}
    assert rows["full"]["real_ratio"] == 1
    assert rows["keep"]["real_ratio"] == pytest.approx(512 / 136, rel=1e-3)
    assert rows["keep"]["kl"]["value"] < 0.01
    assert rows["summary"]["stored_bytes"] % 136 == 0
    other = amkv(*words[:-4], "-o", "r.json")
    assert other.code == 2
    assert "store int8 there, null here" in other.err
