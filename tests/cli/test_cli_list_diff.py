"""list and diff: what is in a folder, and what two artifacts do not have in common."""

from __future__ import annotations

import json
import os
from pathlib import Path

from helptext import documented

from amcli.commands import diff
from amcli.commands.list import age
from conftest import Amkv

GOOD = Path(__file__).parents[2] / "formats" / "vectors" / "good"


def test_a_line_for_each_artifact_and_broken_ones_are_named(
    amkv: Amkv, here: Path, compact: Path, full: Path
) -> None:
    (here / "cut.amkv").write_bytes(compact.read_bytes()[:-1])
    (here / "folder.amkv").mkdir()
    done = amkv("list")
    assert (done.code, done.err) == (0, "")
    heading, first, second, *broken = done.out.splitlines()
    assert heading.split() == ["name", "model", "document", "tokens", "ratio", "size", "age"]
    assert first.split()[:3] == ["doc.amkv", "pocket", "doc.txt"]
    assert "1.0×" in first
    assert second.split()[:5] == ["doc.prefill.amkv", "pocket", "doc.txt", "248", "whole"]
    assert [line.split()[:2] for line in broken] == [
        ["broken:", "cut.amkv"], ["broken:", "folder.amkv"],
    ]  # fmt: skip
    assert "payload-truncated" in broken[0]
    record = json.loads(amkv("list", "--json").out)
    assert [x["name"] for x in record["artifacts"]] == [
        "cut.amkv", "doc.amkv", "doc.prefill.amkv", "folder.amkv",
    ]  # fmt: skip
    assert set(record["artifacts"][1]) == documented("list")
    assert record["artifacts"][1]["error"] is None
    assert record["artifacts"][0]["error"].startswith("cut.amkv is not a valid .amkv file")


def test_folders_without_artifacts_and_without_existence(amkv: Amkv, here: Path) -> None:
    empty = amkv("list")
    assert (empty.code, empty.out, empty.err) == (0, "", "no .amkv files in .\n")
    assert json.loads(amkv("list", "--json").out) == {"folder": ".", "artifacts": []}
    missing, file = amkv("list", "nowhere"), amkv("list", "doc.txt")
    assert (missing.code, missing.errors[0]) == (2, "error: no such folder: nowhere")
    assert (file.code, file.errors[0]) == (2, "error: doc.txt is a file")


def test_a_name_cannot_drive_the_terminal(amkv: Amkv, here: Path, compact: Path) -> None:
    os.rename(compact, here / "\x1b[2Jx.amkv")
    assert "\x1b" not in amkv("list").out


def test_every_example_is_listed(amkv: Amkv) -> None:
    found = json.loads(amkv("list", GOOD, "--json").out)["artifacts"]
    assert len(found) == len(list(GOOD.glob("*.amkv")))
    assert {entry["error"] for entry in found} == {None}
    assert len(amkv("list", GOOD).out.splitlines()) == len(found) + 1


def test_ages() -> None:
    now = 1_700_000_000  # 2023-11-14T22:13:20Z
    assert age("2023-11-14T22:13:00Z", now) == "now"
    assert age("2023-11-14T22:08:00.123456789Z", now) == "5 min"
    assert age("2023-11-14T19:00:00Z", now) == "3 h"
    assert age("2023-11-02T00:00:00Z", now) == "12 d"
    assert age("2030-01-01T00:00:00Z", now) == "now"  # another clock
    assert age("9999-99-99T00:00:00Z", now) == "?"


def test_diff_of_a_file_with_itself(amkv: Amkv, compact: Path) -> None:
    record = json.loads(amkv("diff", compact, compact, "--json").out)
    assert set(record) == documented("diff")
    assert record["differences"] == {}
    assert record["same_document"] is record["same_model"] is record["same_contents"] is True
    assert record["moved"] == 0


def test_diff_of_a_prefill_and_what_was_made_of_it(amkv: Amkv, compact: Path, full: Path) -> None:
    record = json.loads(amkv("diff", full, compact, "--json").out)
    assert (record["same_document"], record["same_model"]) == (True, True)
    assert record["same_contents"] is True  # every key was kept
    assert record["differences"]["kind"] == ["prefill", "compact"]
    assert record["differences"]["method"] == [None, "keep"]
    text = amkv("diff", full, compact).out
    assert max(map(len, text.splitlines())) <= 80
    assert "same      document\nsame      model\n" in text


def test_diff_of_files_of_different_models(amkv: Amkv) -> None:
    a, b = GOOD / "compact-f32.amkv", GOOD / "states.amkv"
    record = json.loads(amkv("diff", a, b, "--json").out)
    assert record["same_contents"] is False
    text = amkv("diff", a, b).out
    assert "different keys and values" in text
    assert max(map(len, text.splitlines())) <= 80 + len(str(a))
    missing = amkv("diff", a, "no.amkv")
    assert (missing.code, missing.errors[0]) == (2, "error: no such file: no.amkv")


def test_long_names_do_not_run_into_their_values() -> None:
    name = "fit_errors.a-name-of-its-own.median"
    record = {"a": "a", "b": "b", "same_document": True, "same_model": True, "moved": None}
    record |= {"same_contents": False, "differences": {name: (0.79, 5650.0)}}
    *_, last = diff._text(record)
    assert last.split() == [name, "0.79", "5650"]
