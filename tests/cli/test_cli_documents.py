"""Documents in several files and forms, from the command line; what was read is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amkv_format import AmkvFile
from conftest import Amkv


def test_several_files_are_one_context(amkv: Amkv, here: Path) -> None:
    (here / "page.html").write_text("<h1>Pets</h1><p>Anna owns a lynx.</p>")
    (here / "notes.md").write_text("# Notes\n\nNone.")
    done = amkv("prefill", "page.html", "notes.md", "--json")
    assert done.code == 0
    record = json.loads(done.out)
    assert record["file"] == "page.prefill.amkv"
    assert record["document"] == "page.html, notes.md"
    assert record["files"] == [
        {"name": "page.html", "characters": 25, "pages": None},
        {"name": "notes.md", "characters": 14, "pages": None},
    ]
    assert done.err.splitlines()[:2] == [
        "read page.html: 25 characters",
        "read notes.md: 14 characters",
    ]
    with AmkvFile.open(here / "page.prefill.amkv") as file:
        assert file.manifest["source"]["name"] == "page.html, notes.md"
        assert [f["name"] for f in file.manifest["source"]["files"]] == ["page.html", "notes.md"]


def test_compact_takes_several_too_and_replaces_none_of_them(amkv: Amkv, here: Path) -> None:
    (here / "more.txt").write_text("Anna owns a lynx.")
    words = ("compact", "doc.txt", "more.txt", "--method", "keep", "-q")
    refused = amkv(*words, "-o", "more.txt", "--force")
    assert refused.code == 2
    assert "more.txt is the source" in refused.errors[0]
    done = amkv(*words)
    assert (done.code, done.out) == (0, "doc.amkv\n")


def test_standard_input_is_one_of_them(amkv: Amkv, here: Path) -> None:
    done = amkv("prefill", "doc.txt", "-", "-q", "-o", "both.amkv", stdin=b"And an otter.")
    assert done.code == 0
    with AmkvFile.open(here / "both.amkv") as file:
        assert file.manifest["source"]["name"] == "doc.txt, stdin.txt"


def test_a_document_that_cannot_fit_is_refused_before_the_weights_are_read(
    amkv: Amkv, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from amcli.models import memory

    def unread(*arguments: object, **options: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(memory, "free_bytes", lambda device: 46_000_000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unread)
    for command in ("prefill", "compact"):
        done = amkv(command, "doc.txt")
        assert done.code == 5
        assert "doc.txt has " in done.errors[0]
        assert "cpu has 46 MB free" in done.errors[0]
        assert "shorten the document to about" in done.errors[1]
    assert [path.name for path in here.iterdir()] == ["doc.txt"]


def test_a_model_of_ones_own_is_shown_with_what_it_takes(amkv: Amkv, here: Path) -> None:
    from amcli.pocket import folder

    done = amkv("prefill", "doc.txt", "--model", str(folder()), "--dtype", "bfloat16")
    line = next(line for line in done.err.splitlines() if " in bfloat16 on cpu: " in line)
    assert "on cpu: 22.6 MB of " in line
