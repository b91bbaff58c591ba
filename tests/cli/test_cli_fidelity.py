"""--fidelity: the smallest context that agrees with the full one as often as was asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from amcli.models.calling import run
from amcli.models.loading import load
from amcli.pipeline.compaction import fidelity
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.opening import restore
from amcli.storage.artifacts import Artifact
from amkv_format import AmkvFile
from conftest import Amkv

FAST = ("--method", "kvzip")


def search(amkv: Amkv, full: Path, *words: str) -> dict:  # type: ignore[type-arg]
    done = amkv("compact", full, "--json", "--force", *words)
    assert done.code == 0, done.err
    return json.loads(done.out)  # type: ignore[no-any-return]


def context(path: str) -> Context:
    with Artifact.open(path) as artifact:
        return restore(artifact, load("pocket", device="cpu"))


@torch.no_grad()
def likeliest(context: Context) -> list[int]:
    """The likeliest tokens of the held-out text, one passage and one token after the other."""
    found = []
    for passage in fidelity.held_out(context, 0):
        cache = context.cache.fork()
        feed = [passage.ids[: passage.first], *([t] for t in passage.ids[passage.first : -1])]
        for ids in feed:
            model = context.loaded.model
            logits = run(model, cache, torch.tensor([ids])).logits
            found.append(int(logits[0, -1].argmax()))
    return found


def test_the_artifact_agrees_as_often_as_it_says(amkv: Amkv, full: Path) -> None:
    record = search(amkv, full, "--fidelity", "0.9", "--queries", "repeat")
    reached = record["fidelity"]
    assert reached["asked"] == 0.9
    assert reached["agreement"] >= 0.9
    pairs = list(zip(likeliest(context(str(full))), likeliest(context("doc.amkv")), strict=True))
    assert len(pairs) == reached["tokens"]
    agree = sum(a == b for a, b in pairs) / len(pairs)
    assert agree == pytest.approx(reached["agreement"], abs=1.5 / len(pairs))  # near ties
    last = next(p for p in reached["probes"] if p["stored_bytes"] == record["stored_bytes"])
    assert last["agreement"] == reached["agreement"]
    assert last["real_ratio"] == record["ratio"]
    with AmkvFile.open("doc.amkv") as file:
        assert file.manifest["fidelity"] == reached
        assert file.manifest["requested"] == record["requested"]
        assert record["requested"] == {"fidelity": 0.9, "ratio": last["ratio"]}


def test_every_larger_ratio_that_was_tried_fell_short(amkv: Amkv, full: Path) -> None:
    reached = search(amkv, full, "--fidelity", "0.9", *FAST)["fidelity"]
    assert 2 <= len(reached["probes"]) <= 8
    good = [p["ratio"] for p in reached["probes"] if p["agreement"] >= 0.9]
    bad = [p["ratio"] for p in reached["probes"] if p["agreement"] < 0.9]
    assert max(good) < min(bad) < max(good) * 1.14


def test_a_higher_fidelity_never_gives_a_larger_ratio(amkv: Amkv, full: Path) -> None:
    ratios = [
        search(amkv, full, "--fidelity", f, *FAST)["ratio"] for f in ("0.6", "0.9", "0.99", "1")
    ]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 1.5 * ratios[-1]


def test_people_read_what_was_reached(amkv: Amkv, full: Path) -> None:
    done = amkv("compact", full, "--fidelity", "0.8", "--store", "int8", *FAST)
    line = next(line for line in done.err.splitlines() if line.startswith("agreement"))
    assert "asked for 0.8 (" in line
    assert "held-out tokens" in line
    assert max(map(len, done.err.splitlines())) <= 80


def test_the_fields_of_the_search_are_documented(amkv: Amkv, full: Path) -> None:
    record = search(amkv, full, "--fidelity", "0.5", "--method", "random")
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    names = (*record["fidelity"], *record["fidelity"]["probes"][0], *record["seconds"])
    for name in names:
        assert f"`{name}`" in text, name


def test_a_budget_file_and_any_seed_go_with_it(amkv: Amkv, full: Path) -> None:
    amkv("compact", full, "--save-budget", "b.json", "-o", "b.amkv", *FAST)
    words = ("--fidelity", "0.7", "--budget", "b.json", "--seed", "5", *FAST)
    record = search(amkv, full, *words)
    assert record["budget"] == "file"
    assert record["fidelity"]["agreement"] >= 0.7


def test_what_cannot_be_reached_is_said_and_nothing_is_written(
    amkv: Amkv, here: Path, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "ratios", lambda *args, **more: [20.0, 40.0, 80.0])
    before = sorted(os.listdir(here))
    words = ("--fidelity", "0.999", "--method", "random", "--save-budget", "b.json")
    done = amkv("compact", full, *words)
    assert done.code == 2
    assert "no ratio reaches an agreement of 0.999: the best seen is 0." in done.errors[0]
    assert "--method keep" in done.errors[1]
    assert sorted(os.listdir(here)) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fidelity", "0"), "--fidelity 0 is not a share"),
        (("--fidelity", "1.5"), "--fidelity 1.5 is not a share"),
        (("--fidelity", "-0.5"), "--fidelity -0.5 is not a share"),
        (("--fidelity", "nan"), "--fidelity nan is not a number"),
        (("--fidelity", "most"), "--fidelity most is not a number"),
        (("--fidelity", "0.9", "--ratio", "20"), "--fidelity and --ratio exclude each other"),
        (("--fidelity", "0.9", "--tokens", "20"), "--fidelity and --tokens exclude each other"),
        (("--fidelity", "0.9", "--method", "keep"), "keeps every key"),
    ],
)
def test_what_makes_no_sense(
    amkv: Amkv, here: Path, full: Path, words: tuple[str, ...], message: str
) -> None:
    done = amkv("compact", full, *words)
    assert done.code == 2
    assert message in done.errors[0]
    assert len(done.errors) == 2
    assert not (here / "doc.amkv").exists()
