"""The receipt of compact: what a person reads, and the same in full with --json."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from amcli.commands import receipt
from amcli.commands.receipt import HeadFacts
from amcli.pipeline.queries import self_study
from amcli.system.units import error_text
from amkv_format import AmkvFile
from conftest import Amkv

FAST = ("--method", "highest-attention")


def test_a_person_sees_sizes_seconds_errors_and_the_heads_that_stand_out(
    amkv: Amkv, full: Path
) -> None:
    done = amkv("compact", full, "--ratio", "10", "--queries", "repeat")
    assert (done.code, done.out) == (0, "doc.amkv\n")
    lines = done.err.splitlines()
    assert re.fullmatch(r"[\d.]+ MB → \d+ kB, 10\.\d× smaller, in .+ s", lines[0])
    assert re.fullmatch(
        r"  load .+ s, reference .+ s, compact .+ s, errors .+ s, write .+ s", lines[1]
    )
    assert "entries a head" in lines[2]
    assert re.fullmatch(
        r"error on 256 held-out queries a head: output \d\.\d+, mass \d\.\d+ on average", lines[3]
    )
    assert lines[4].split() == ["most", "entries", "largest", "errors"]
    assert lines[5].split() == ["layer", "head", "entries", "output", "mass"] * 2
    table = [line.split() for line in lines[6:11]]
    assert all(len(row) == 10 for row in table)
    assert [int(row[2]) for row in table] == sorted((int(r[2]) for r in table), reverse=True)
    assert [float(r[8]) for r in table] == sorted((float(r[8]) for r in table), reverse=True)
    assert lines[11:] == ["next: amkv chat --context doc.amkv"]
    assert max(map(len, lines)) <= 80


def test_json_has_all_of_it(amkv: Amkv, full: Path) -> None:
    done = amkv("compact", full, "--ratio", "10", "--json", "--queries", "repeat")
    record = json.loads(done.out)
    with AmkvFile.open("doc.amkv") as file:
        stored, errors = file.manifest["stored"], file.manifest["fit_errors"]
        attention = file.manifest["attention"]
    flat = sorted(
        ((t, -i, -h) for i, x in enumerate(stored) for h, t in enumerate(x)), reverse=True
    )
    assert [(x["entries"], -x["layer"], -x["head"]) for x in record["most_entries"]] == flat[:5]
    worst = max(e for heads in errors["output"] for e in heads)
    assert record["largest_errors"][0]["output_error"] == worst
    assert record["fit_errors"]["output"]["max"] == worst
    for head in record["most_entries"] + record["largest_errors"]:
        layer, h = head["layer"], head["head"]
        assert head["mass_error"] == errors["mass"][layer][h]
        assert head["output_error"] == errors["output"][layer][h]
        assert head["attention"] == attention[layer][h]
    for name in ("mass", "output"):  # in the mean a head counts by its attention
        pairs = [(e, a) for x, y in zip(errors[name], attention, strict=True)
                 for e, a in zip(x, y, strict=True)]  # fmt: skip
        mean = sum(e * a for e, a in pairs) / sum(a for _, a in pairs)
        assert record["fit_errors"][name]["mean"] == pytest.approx(mean, rel=1e-4)
    assert record["queries"]["held_out"] == 256
    stages = {"load", "reference", "compact", "errors", "write", "total"}
    assert set(record["seconds"]) == stages
    parts = sum(s for name, s in record["seconds"].items() if name != "total")
    assert parts <= record["seconds"]["total"] + 0.01
    assert (record["fidelity"], record["budget_file"], record["saved_budget"]) == (None,) * 3


def test_the_heads_are_documented(amkv: Amkv, full: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    made = json.loads(amkv("compact", full, "--ratio", "4", "--json", *FAST).out)
    for name in (*made["most_entries"][0], *made["seconds"], *made["fit_errors"]["mass"]):
        assert f"`{name}`" in text, name


def test_self_study_is_a_stage_of_its_own(
    amkv: Amkv, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_study, "MOST", 4)
    monkeypatch.setattr(self_study, "LEAST", 4)
    words = ("compact", full, "--ratio", "4", "--queries", "self-study", "--json", *FAST)
    seconds = json.loads(amkv(*words).out)["seconds"]
    assert seconds["self-study"] > 0
    assert seconds["reference"] > 0


def test_methods_without_queries_have_a_receipt_too(amkv: Amkv, full: Path) -> None:
    done = amkv("compact", full, "--method", "streaming", "--ratio", "3")
    assert "error on 256 held-out queries a head" in done.err
    quiet = amkv("compact", full, "--method", "streaming", "--ratio", "3", "-q", "-f")
    assert (quiet.out, quiet.err) == ("doc.amkv\n", "")


def test_a_bad_receipt_says_so_and_what_to_type(amkv: Amkv, full: Path) -> None:
    words = ("compact", full, "--ratio", "150", "--queries", "repeat", *FAST)
    done = amkv(*words)
    [line] = [line for line in done.err.splitlines() if line.startswith("warning:")]
    assert re.fullmatch(
        r"warning: output error \d\.\d\d: above 0\.3 answers change; try --ratio 75",
        line,
    )
    [said] = json.loads(amkv(*words, "--json", "--force").out)["warnings"]
    assert f"warning: {said}" == line
    good = json.loads(amkv("compact", full, "--ratio", "10", *FAST, "--json", "--force").out)
    assert good["warnings"] == []


@pytest.mark.parametrize("store", ["int8", "int4", "k4v4", "k3v2"])
def test_a_store_that_spoils_a_layer_is_warned_of_where_it_was_asked_for(
    amkv: Amkv, full: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    words = ("compact", full, "--ratio", "10", *FAST, "--json", "--force")
    says = rf"{store} changes layer \d's output by \d+%; try --store auto"
    warned = json.loads(amkv(*words, "--store", store).out)["warnings"]
    assert bool([x for x in warned if re.fullmatch(says, x)]) == (store == "k3v2")
    monkeypatch.setattr("amcli.pipeline.compaction.choices.ROUNDING", 1e-4)
    warned = json.loads(amkv(*words, "--store", store).out)["warnings"]
    assert [x for x in warned if re.fullmatch(says, x)]
    for other in ((), ("--store", "native"), ("--store", "auto")):
        warned = json.loads(amkv(*words, *other).out)["warnings"]
        assert not [x for x in warned if "changes layer" in x]


# ---- large numbers -----------------------------------------------------------------------------


def test_errors_of_any_size_can_be_read() -> None:
    shown = {0.0417: "0.042", 9.9996: "10.000", 12.34: "12.3", 999.9: "1,000", 5650.2: "5,650"}
    shown |= {99_960: "1.0e5", 123_456: "1.2e5", 7.77e30: "7.8e30", float("inf"): "inf"}
    assert {error: error_text(error) for error in shown} == shown
    assert error_text(None) == "–"


errors = st.none() | st.floats(min_value=0) | st.just(float("nan"))


@given(errors, errors, st.integers(0, 10**9))
@example(0.792, 5650.0, 300)
@example(9.9996, 99_999.0, 10**8)
def test_columns_never_run_together(output: float | None, mass: float | None, entries: int) -> None:
    texts = [error_text(output), error_text(mass)]
    assert max(map(len, texts)) <= 6
    row = receipt._row(HeadFacts(31, 7, entries, mass, output, None))
    assert row.split() == ["31", "7", f"{entries:,}", *texts]
    assert len(row) == 37 or entries >= 1_000_000


class Made:
    """What `warnings` looks at."""

    rounding = None


def warned(monkeypatch: pytest.MonkeyPatch, *heads: HeadFacts) -> list[str]:
    monkeypatch.setattr(receipt, "facts", lambda made: list(heads))
    manifest = {"requested": {"ratio": 20}, "fit_errors": {"output": [[0.1, 0.1]]}}
    return list(receipt.warnings(Made(), manifest))  # type: ignore[arg-type]


def test_huge_errors_are_warned_of_where_the_head_looks_at_the_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = HeadFacts(0, 0, 5, 0.1, 0.1, 0.5)
    assert warned(monkeypatch, good, HeadFacts(0, 1, 5, 5650.0, 0.1, 0.001)) == []
    bad = [HeadFacts(3, 1, 5, 5650.0, 0.792, 0.5), HeadFacts(4, 0, 5, 0.1, 11.0, None)]
    [said] = warned(monkeypatch, good, *bad)
    assert said == (
        "2 heads with an error of 10 or more, 5,650 in layer 3, head 1: worse than no document; "
        "try --ratio 10"
    )
    [said] = warned(monkeypatch, good, HeadFacts(3, 1, 5, float("nan"), 0.1, 0.5))
    assert said.startswith("a head with an error of 10 or more, inf in layer 3, head 1")


def test_a_huge_mean_is_written_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipt, "facts", lambda made: [])
    manifest = {"requested": {"tokens": 4}, "fit_errors": {"output": [[5650.0]]}}
    [said] = receipt.warnings(Made(), manifest)  # type: ignore[arg-type]
    assert said == "output error 5,650: above 0.3 answers change; try --tokens 8"
