"""--fidelity and --ratio auto: the smallest context that keeps as much as was asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from amcli.models.calling import run
from amcli.models.loading import load
from amcli.pipeline.compaction import fidelity
from amcli.pipeline.compaction.defaults import AUTO_FIDELITY
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.forcing import end_token
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries.quotes import exchanges
from amcli.storage.artifacts import Artifact
from amkv_format import AmkvFile
from conftest import Amkv

FAST = ("--method", "kvzip")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "QUOTES", 12)


def search(amkv: Amkv, full: Path, *words: str) -> dict:  # type: ignore[type-arg]
    done = amkv("compact", full, "--json", "--force", *words)
    assert done.code == 0, done.err
    return json.loads(done.out)  # type: ignore[no-any-return]


def context(path: str) -> Context:
    with Artifact.open(path) as artifact:
        return restore(artifact, load("pocket", device="cpu"))


@torch.no_grad()
def predictions(context: Context, asked: list[tuple[str, str]]) -> torch.Tensor:
    """`[tokens, V]`: log-probabilities of all tokens of the answers, one token after the other."""
    loaded, found = context.loaded, []
    for question, answer in asked:
        cache = context.cache.fork()
        feed = [loaded.chat.first_turn(question), *([t] for t in loaded.chat.answer_ids(answer))]
        for ids in feed:
            logits = run(loaded.model, cache, torch.tensor([ids])).logits
            found.append(logits[0, -1].double().log_softmax(-1))
    assert end_token(loaded) is not None  # which the last token of each answer predicts
    return torch.stack(found)


def test_what_is_lost_of_held_out_quotes_is_what_it_says(
    amkv: Amkv, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "QUOTES", 5)
    record = search(amkv, full, "--fidelity", "0.9", "--queries", "repeat")
    reached = record["fidelity"]
    assert reached["asked"] == 0.9
    assert reached["agreement"] >= 0.9
    whole = context(str(full))
    fitted = {x.question for x in exchanges(whole, 0)}
    found = exchanges(whole, 7919)
    asked = [(x.question, x.answer) for x in found if x.question not in fitted][:5]
    assert len(asked) == 5
    truth = predictions(whole, asked)
    assert len(truth) == reached["tokens"]

    def lost(other: Context) -> float:
        return float((truth.exp() * (truth - predictions(other, asked))).sum())

    share = lost(context("doc.amkv")) / lost(prefill(whole.loaded, Source("nothing", "")))
    assert share == pytest.approx(1 - reached["agreement"], rel=1e-2, abs=1e-5)
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
    lines = done.err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("fidelity 0."))
    said = " ".join(line.strip() for line in lines[first : first + 3])
    assert " ratios tried with at least 0.8: " in said
    assert "% is lost of what the document adds to " in said
    assert " held-out tokens" in said
    assert max(map(len, lines)) <= 80


def test_auto_is_a_fidelity(
    amkv: Amkv, full: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = search(amkv, full, "--fidelity", f"{AUTO_FIDELITY:g}", *FAST)
    auto = search(amkv, full, "--ratio", "auto", *FAST)
    assert auto["fidelity"] == record["fidelity"]
    assert auto["requested"] == record["requested"]
    assert auto["stored_bytes"] == record["stored_bytes"]
    monkeypatch.setenv("AMKV_RATIO", "auto")
    assert search(amkv, full, *FAST)["fidelity"] == record["fidelity"]
    assert search(amkv, full, *FAST, "--tokens", "9")["requested"] == {"tokens": 9}


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
    assert "no ratio reaches a fidelity of 0.999: the best seen is 0." in done.errors[0]
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
        (("--fidelity", "0.9", "--ratio", "auto"), "--fidelity and --ratio exclude each other"),
        (("--fidelity", "0.9", "--method", "keep"), "keeps every key"),
        (("--ratio", "auto", "--tokens", "20"), "--ratio and --tokens exclude each other"),
        (("--ratio", "auto", "--method", "keep"), "keeps every key"),
        (("--ratio", "automatic"), "--ratio automatic is not a number"),
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
