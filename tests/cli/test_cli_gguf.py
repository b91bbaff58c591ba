"""GGUF files on the command line: made with, found again, and asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import tinygguf

from conftest import Amkv

TEXT = "Anna owns a lynx, and Omar an otter. They live by the sea. " * 2


def test_from_a_text_to_an_answer(amkv: Amkv, here: Path) -> None:
    """`compact` and `chat` are given no model: the file says where it lies."""
    (here / "notes.txt").write_text(TEXT)
    tinygguf.write(here / "tiny.gguf", packed=True)
    made = amkv("prefill", "notes.txt", "--model", "tiny.gguf", "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["model"] == str((here / "tiny.gguf").resolve())
    lines = made.err.splitlines()
    assert lines[0].startswith("read notes.txt")
    assert "tiny.gguf in float32 on cpu: " in lines[1]
    assert "tokens read by" in lines[2]
    assert lines[3].startswith("next: ")
    assert len(lines) == 4  # and none of a library
    words = ("compact", "--method", "highest-attention", "--queries", "repeat", "--ratio", "2")
    assert amkv(*words).code == 0
    answer = amkv("chat", "-c", "notes.amkv", "-p", "Who owns a lynx?", "--max-tokens", "5")
    assert answer.code == 0, answer.err
    assert answer.out


def test_without_a_template(amkv: Amkv, here: Path) -> None:
    (here / "notes.txt").write_text(TEXT)
    tinygguf.write(here / "base.gguf", template=None)
    words = ("compact", "notes.txt", "--model", "base.gguf", "--ratio", "2")
    made = amkv(*words, "--method", "highest-attention")
    assert made.code == 0, made.err
    (line,) = [line for line in made.err.splitlines() if "chat template" in line]
    assert line.startswith("warning: base.gguf has no chat template")
    assert amkv("chat", "-c", "notes.amkv", "-p", "Who?", "--max-tokens", "3").code == 0


def test_a_file_that_has_become_another_model(amkv: Amkv, here: Path) -> None:
    (here / "notes.txt").write_text(TEXT)
    tinygguf.write(here / "tiny.gguf")
    assert amkv("prefill", "notes.txt", "--model", "tiny.gguf").code == 0
    tinygguf.write(here / "tiny.gguf", template=None)
    asked = amkv("chat", "-c", "notes.prefill.amkv", "-p", "Who?")
    assert asked.code == 4
    assert "chat template" in asked.errors[0]
    (here / "tiny.gguf").unlink()
    asked = amkv("chat", "-c", "notes.prefill.amkv", "-p", "Who?")
    assert asked.code == 2
    assert "does not exist" in asked.errors[0]
