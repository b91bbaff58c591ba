"""`amkv compact --plan`: what it says is what `compact` then does, and it does nothing itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helptext import documented
from transformers import AutoModelForCausalLM

from amcli.pocket import folder
from conftest import Amkv


@pytest.fixture
def prefill(amkv: Amkv) -> Path:
    assert amkv("prefill", "doc.txt", "-q").code == 0
    return Path("doc.prefill.amkv")


def test_bytes_are_those_of_the_compaction(amkv: Amkv, prefill: Path) -> None:
    asked = (str(prefill), "--ratio", "4", "--store", "int8", "--budget", "uniform", "--json")
    plan = json.loads(amkv("compact", *asked, "--plan").out)
    assert set(plan) == documented("compact --plan")
    done = json.loads(amkv("compact", *asked, "-o", "small.amkv").out)
    for field in ("method", "budget", "requested", "store", "seed", "full_bytes", "tokens"):
        assert plan[field] == done[field], field
    assert plan["stored_bytes"] == pytest.approx(done["stored_bytes"], rel=0.02)
    assert plan["queries"] == done["queries"]["source"]
    assert sum(layer["bytes"] for layer in plan["layers"]) == plan["stored_bytes"]
    assert plan["store_decided"]
    assert plan["memory"]["cache"] >= plan["full_bytes"]
    assert set(plan["seconds"]) == {"reference", "compact", "total"}


def test_it_writes_nothing_and_reads_no_weights(
    amkv: Amkv, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    before = sorted(os.listdir())
    done = amkv("compact", "doc.txt", "--plan")
    assert done.code == 0
    assert sorted(os.listdir()) == before
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "tokens of pocket: 9 layers, 18 heads to compact" in lines[0]
    assert lines[1] == "method omp, queries repeat+quotes, budget adaptive, seed 0"
    assert "20.0× smaller" in lines[2]
    assert any(line.startswith("memory: 45.3 MB of weights, ") for line in lines)
    assert any(line.startswith("time: about ") and "prefill" in line for line in lines)


def test_an_existing_output_is_no_hindrance(amkv: Amkv, prefill: Path) -> None:
    Path("doc.amkv").write_text("there")
    assert amkv("compact", str(prefill), "--plan").code == 0
    assert Path("doc.amkv").read_text() == "there"


def test_a_prefill_whose_model_is_gone_has_a_plan_without_seconds(
    amkv: Amkv,
) -> None:
    shutil.copytree(folder(), "model")
    assert amkv("prefill", "doc.txt", "--model", "./model", "-q").code == 0
    shutil.rmtree("model")
    done = amkv("compact", "doc.prefill.amkv", "--plan", "--json")
    plan = json.loads(done.out)
    assert done.code == 0
    assert "no time estimate: model folder" in done.err
    assert plan["seconds"] is None
    assert plan["memory"]["weights"] is None
    assert plan["full_bytes"] > plan["stored_bytes"] > 0
    assert not plan["store_decided"]


def test_what_makes_no_sense_is_said_here_too(amkv: Amkv) -> None:
    done = amkv("compact", "doc.txt", "--plan", "--ratio", "1e9")
    assert (done.code, "is more than the context has tokens" in done.err) == (2, True)


@pytest.mark.parametrize("words", [("--ratio", "auto"), ("--fidelity", "0.97")])
def test_a_search_is_planned_as_far_as_it_can_be(amkv: Amkv, words: tuple[str, ...]) -> None:
    done = amkv("compact", "doc.txt", "--plan", *words)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2] == "the ratio is found by trying: the largest with a fidelity of 0.97"
    assert "20.0× smaller" in lines[4]
    plan = json.loads(amkv("compact", "doc.txt", "--plan", "--json", *words).out)
    assert set(plan) == documented("compact --plan")
    assert plan["requested"] == {"ratio": 20.0, "fidelity": 0.97}
    done = amkv("compact", "doc.txt", "--plan", "--tokens", "9", *words)
    assert (done.code, "exclude each other" in done.err) == (2, True)
