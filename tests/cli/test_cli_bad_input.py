"""Every bad input: one clear line, one hint, the right exit code, and no file left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from amcli.pocket import folder as pocket_folder
from conftest import Amkv


@pytest.fixture(autouse=True)
def nothing_left_behind(here: Path) -> Iterator[None]:
    """Whatever is in the folder when a command starts has to be all that is there in the end."""
    yield
    names = {path.name for path in here.iterdir()}
    assert not {name for name in names if name.endswith(".tmp")}
    assert "out.amkv" not in names


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        (here / name).write_bytes(data)

    return prepare


def nothing(here: Path) -> None:
    """A case that needs no file of its own."""


def table_of_positions(here: Path) -> None:
    """A model that has learned its positions one by one, and no more than 128."""
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": 4096}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(here / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pocket_folder() / name, here / "model")


def truncated(here: Path) -> None:
    path = here / "doc.amkv"
    path.write_bytes(path.read_bytes()[:-1000])


def without_tokenizer(here: Path) -> None:
    target = here / "model"
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).symlink_to(pocket_folder() / name)


def other_model(here: Path) -> None:
    """pocket with another name for whoever answers: another chat template."""
    target = here / "model"
    shutil.copytree(pocket_folder(), target)
    template = target / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))


TO = ("-o", "out.amkv")
LATIN = "Ein schöner Tag.".encode("latin1")

# name: (what is there, words, exit code, what the line says, what the hint says)
CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], int, str, str]] = {
    "missing file": (nothing, ("prefill", "no.txt", *TO), 2, "no such file: no.txt", "check the"),
    "empty file": (write("e.txt", b" \n"), ("prefill", "e.txt", *TO), 2, "e.txt is empty", "text"),
    "a folder": (nothing, ("prefill", ".", *TO), 2, ". is a folder", "name one file"),
    "a folder as an artifact": (nothing, ("chat", "-c", "."), 3, "is a folder", "make it again"),
    "binary data": (
        write("b.txt", b"abc\0def"),
        ("compact", "b.txt", *TO),
        2,
        "b.txt is binary data, not text (a zero byte at 3)",
        "UTF-8",
    ),
    "not UTF-8": (write("l.txt", LATIN), ("prefill", "l.txt", *TO), 2, "not UTF-8", "iconv"),
    "too long": (
        table_of_positions,
        ("prefill", "doc.txt", "--model", "model", *TO),
        2,
        "128 positions",
        "shorten",
    ),
    "too long to compact": (
        table_of_positions,
        ("compact", "doc.txt", "--model", "model", *TO),
        2,
        "128 positions",
        "shorten",
    ),
    "missing GGUF file": (
        nothing,
        ("prefill", "doc.txt", "--model", "no.gguf", *TO),
        2,
        "GGUF file no.gguf does not exist",
        "--model",
    ),
    "ratio below 1": (nothing, ("compact", "doc.txt", "--ratio", "0.5"), 2, "0.5 is below 1", "20"),
    "ratio above T": (
        nothing,
        ("compact", "doc.prefill.amkv", "--ratio", "100000", *TO),
        2,
        "--ratio 100000 is more than the context has tokens",
        "use a ratio between 1 and",
    ),
    "ratio above T of a text": (
        nothing,
        ("compact", "doc.txt", "--ratio", "100000", *TO),
        2,
        "--ratio 100000 is more than the context has tokens",
        "use a ratio between 1 and",
    ),
    "ratio and tokens": (
        nothing,
        ("compact", "doc.txt", "--ratio", "5", "--tokens", "9", *TO),
        2,
        "--ratio and --tokens exclude each other",
        "one of them",
    ),
    "no number": (nothing, ("compact", "--ratio", "ten"), 2, "--ratio ten is not a number", "20"),
    "nan": (nothing, ("compact", "--ratio", "nan"), 2, "--ratio nan is not a number", "20"),
    "no whole number": (nothing, ("compact", "--seed", "1.5"), 2, "--seed 1.5 is not", "--seed 1"),
    "unknown method": (
        nothing,
        ("compact", "doc.txt", "--method", "opm", *TO),
        2,
        "unknown method 'opm'",
        "did you mean 'omp'?",
    ),
    "unknown budget": (
        nothing,
        ("compact", "doc.txt", "--budget", "even", *TO),
        2,
        "unknown budget 'even'",
        "adaptive, uniform",
    ),
    "unknown queries": (
        nothing,
        ("compact", "doc.txt", "--queries", "none", *TO),
        2,
        "unknown reference queries 'none'",
        "repeat",
    ),
    "existing output": (
        nothing,
        ("compact", "doc.txt"),
        2,
        "doc.amkv already exists",
        "add --force",
    ),
    "output folder missing": (
        nothing,
        ("prefill", "doc.txt", "-o", "no/out.amkv"),
        2,
        "the folder no does not exist",
        "make it",
    ),
    "output is a folder": (
        nothing,
        ("prefill", "doc.txt", "-o", ".", "--force"),
        1,
        "cannot write .: Is a directory",
        "-o",
    ),
    "output is a device": (
        nothing,
        ("prefill", "doc.txt", "-o", "/dev/null", "--force"),
        1,
        "a device or a pipe",
        "-o",
    ),
    "truncated artifact": (truncated, ("chat", "-c", "doc.amkv"), 3, "payload-truncated", "again"),
    "truncated, inspected": (truncated, ("inspect", "doc.amkv"), 3, "payload-truncated", "again"),
    "foreign artifact": (
        write("f.amkv", (2).to_bytes(8, "little") + b"{}"),
        ("chat", "-c", "f.amkv"),
        3,
        "f.amkv is not a valid .amkv file",
        "make it again",
    ),
    "foreign source": (
        write("f.amkv", (2).to_bytes(8, "little") + b"{}"),
        ("compact", "f.amkv", *TO),
        3,
        "f.amkv is not a valid .amkv file",
        "make it again",
    ),
    "a text as an artifact": (
        nothing,
        ("chat", "-c", "doc.txt"),
        3,
        "doc.txt is not an .amkv file",
        "amkv compact doc.txt",
    ),
    "missing artifact": (nothing, ("inspect", "no.amkv"), 2, "no such file: no.amkv", "check"),
    "missing source": (nothing, ("compact", "no.amkv"), 2, "no such file: no.amkv", "check"),
    "an artifact as a document": (
        nothing,
        ("prefill", "doc.amkv", *TO),
        2,
        "doc.amkv is an artifact, not a text",
        "amkv compact doc.amkv",
    ),
    "compact twice": (
        nothing,
        ("compact", "doc.amkv", *TO),
        2,
        "doc.amkv is compact already",
        "the prefill it was made from",
    ),
    "nothing prefilled yet": (nothing, ("compact",), 2, "nothing to compact", "amkv prefill"),
    "no context": (nothing, ("chat",), 2, "no context was given", "--context doc.amkv"),
    "one of two contexts missing": (
        nothing,
        ("chat", "-c", "doc.amkv", "-c", "other.amkv"),
        2,
        "other.amkv",
        "check",
    ),
    "no question": (
        nothing,
        ("chat", "-c", "doc.amkv", "-p", " "),
        2,
        "the question is empty",
        "-p",
    ),
    "no questions in the pipe": (
        nothing,
        ("chat", "-c", "doc.amkv"),
        2,
        "no question was given",
        "-p",
    ),
    "no answer": (
        nothing,
        ("chat", "-c", "doc.amkv", "--max-tokens", "0"),
        2,
        "--max-tokens 0 is below 1",
        "--max-tokens 256",
    ),
    "freezing": (
        nothing,
        ("chat", "-c", "doc.amkv", "--temperature", "-1"),
        2,
        "--temperature -1 is below 0",
        "--temperature 0.7",
    ),
    "model folder missing": (
        nothing,
        ("prefill", "doc.txt", "--model", "./no", *TO),
        2,
        "model folder no does not exist",
        "--model",
    ),
    "model folder without tokenizer": (
        without_tokenizer,
        ("prefill", "doc.txt", "--model", "./model", *TO),
        2,
        "model folder model has no tokenizer",
        "tokenizer.json",
    ),
    "another model": (
        other_model,
        ("chat", "-c", "doc.amkv", "--model", "./model", "-p", "x"),
        4,
        "chat template: file sha256:",
        "use --model pocket",
    ),
    "another model's prefill": (
        other_model,
        ("compact", "doc.prefill.amkv", "--model", "./model", *TO),
        4,
        "chat template: file sha256:",
        "use --model pocket",
    ),
    "unknown device": (
        nothing,
        ("prefill", "doc.txt", "--device", "abacus", *TO),
        2,
        "unknown device 'abacus'",
        "cpu",
    ),
    "unknown dtype": (
        nothing,
        ("prefill", "doc.txt", "--dtype", "int1", *TO),
        2,
        "unknown dtype 'int1'",
        "bfloat16",
    ),
    "no document": (nothing, ("prefill",), 2, "missing argument 'DOC'", "amkv prefill --help"),
    "one of two documents missing": (
        nothing,
        ("prefill", "doc.txt", "b", *TO),
        2,
        "no such file: b",
        "check the path",
    ),
    "an artifact among documents": (
        nothing,
        ("compact", "doc.txt", "doc.amkv", *TO),
        2,
        "doc.amkv is an artifact, not a text",
        "amkv compact doc.amkv",
    ),
    "unknown command": (nothing, ("compct",), 2, "no such command 'compct'", "mean 'compact'?"),
    "unknown option": (
        nothing,
        ("compact", "--ratoi", "3"),
        2,
        "no such option: --ratoi",
        "did you mean --ratio? see amkv compact --help",
    ),
    "option without value": (nothing, ("compact", "--ratio"), 2, "'--ratio' requires", "--help"),
    "demo into a full folder": (nothing, ("demo", "--keep", "."), 2, ". already exists", "--keep"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(amkv: Amkv, here: Path, full: Path, compact: Path, case: str) -> None:
    prepare, words, code, message, hint = CASES[case]
    prepare(here)
    before = sorted(os.listdir(here))
    done = amkv(*words)
    assert done.code == code
    assert done.out == ""
    assert len(done.errors) == 2, done.err
    error, advice = done.errors
    assert message in error
    assert hint in advice
    assert "Traceback" not in done.err
    assert sorted(os.listdir(here)) == before


def test_a_last_prefill_that_is_gone(amkv: Amkv, here: Path) -> None:
    amkv("prefill", "doc.txt")
    (here / "doc.prefill.amkv").unlink()
    done = amkv("compact")
    assert done.code == 2
    assert "the last prefill" in done.errors[0]
    assert "is gone" in done.errors[0]
