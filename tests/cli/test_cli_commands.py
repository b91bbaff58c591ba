"""prefill and compact as they are typed: files, names, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from amcli.matching import catalogue
from amcli.pipeline.compaction.request import Request
from amkv_format import AmkvFile
from conftest import Amkv


def test_the_three_commands_of_the_mission_in_a_folder_with_nothing_but_the_document(
    process: Amkv, here: Path
) -> None:
    first = process("prefill", "doc.txt")
    assert (first.code, first.out) == (0, "doc.prefill.amkv\n")
    second = process("compact", "--ratio", "20", "--method", "omp")
    assert (second.code, second.out) == (0, "doc.amkv\n")
    assert "doc.prefill.amkv, the last prefill" in second.err
    third = process("chat", "--context", "doc.amkv", stdin=b"Where is it?\n")
    assert third.code == 0
    assert third.out.strip()
    assert sorted(os.listdir(here)) == ["doc.amkv", "doc.prefill.amkv", "doc.txt"]
    with AmkvFile.open(here / "doc.amkv") as file:
        file.verify()
        assert file.kind == "compact"
        assert file.ratio == pytest.approx(20, rel=0.05)


def test_each_command_says_what_to_type_next(amkv: Amkv) -> None:
    assert "next: amkv compact --ratio 20\n" in amkv("prefill", "doc.txt").err
    done = amkv("compact", "--ratio", "4", "--method", "highest-attention")
    assert "next: amkv chat --context doc.amkv\n" in done.err
    assert "× smaller" in done.err


def test_the_demonstration_model_is_named_as_such_unless_it_was_asked_for(amkv: Amkv) -> None:
    default = amkv("prefill", "doc.txt")
    assert [line for line in default.err.splitlines() if "demonstration" in line] == [
        "using pocket, a demonstration model; for a real one: --model Qwen/Qwen3-4B"
    ]
    named = amkv("prefill", "doc.txt", "--model", "pocket", "--force")
    assert "demonstration" not in named.err


def test_the_model_can_come_from_the_environment(
    amkv: Amkv, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMKV_MODEL", str(here / "no-such-model"))
    done = amkv("prefill", "doc.txt")
    assert done.code == 2
    assert "no-such-model does not exist" in done.err


def test_quiet_leaves_the_result_only(amkv: Amkv) -> None:
    for words in (("-q", "prefill", "doc.txt"), ("prefill", "doc.txt", "-q", "-f")):
        done = amkv(*words)
        assert (done.code, done.out, done.err) == (0, "doc.prefill.amkv\n", "")


def test_json_prints_one_object_and_nothing_else(amkv: Amkv) -> None:
    made = json.loads(amkv("prefill", "doc.txt", "--json").out)
    assert made["file"] == "doc.prefill.amkv"
    assert made["file_bytes"] == Path("doc.prefill.amkv").stat().st_size
    compact = json.loads(amkv("compact", "--json", "--ratio", "5", "--seed", "3").out)
    assert compact["requested"] == {"ratio": 5.0}
    assert compact["seed"] == 3
    assert compact["ratio"] == pytest.approx(compact["full_bytes"] / compact["stored_bytes"], 1e-3)
    assert compact["tokens"] == made["tokens"]
    assert 0 < compact["fit_errors"]["output"]["median"] < 2


def test_a_text_is_prefilled_first_and_leaves_one_file(amkv: Amkv, here: Path) -> None:
    done = amkv("compact", "doc.txt", "--tokens", "16", "--method", "highest-attention")
    assert done.out == "doc.amkv\n"
    assert sorted(os.listdir(here)) == ["doc.amkv", "doc.txt"]
    with AmkvFile.open("doc.amkv") as file:
        assert file.manifest["requested"] == {"tokens": 16}
        assert sum(layer.rows for layer in file.layers) <= 16 * 2 * len(file.layers)


def test_a_text_and_its_prefill_compact_to_the_same(amkv: Amkv, full: Path) -> None:
    amkv("compact", full, "-o", "a.amkv", "--method", "highest-attention", "--ratio", "3")
    amkv("compact", "doc.txt", "-o", "b.amkv", "--method", "highest-attention", "--ratio", "3")
    with AmkvFile.open("a.amkv") as a, AmkvFile.open("b.amkv") as b:
        assert a.manifest["payload_hash"] == b.manifest["payload_hash"]


def test_standard_input_is_a_document_for_both(amkv: Amkv, here: Path) -> None:
    text = (here / "doc.txt").read_bytes()
    assert amkv("prefill", "-", stdin=text).out == "stdin.prefill.amkv\n"
    done = amkv("compact", "-", "--ratio", "2", "--method", "highest-attention", stdin=text)
    assert done.out == "stdin.amkv\n"


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("a/book.prefill.amkv", "book.amkv"),
        ("book.amkv", "book.compact.amkv"),
        ("a.b.prefill.amkv", "a.b.amkv"),
        ("looks/like/text.bin", "text.compact.amkv"),
    ],
)
def test_the_name_of_the_output_follows_the_source(
    amkv: Amkv, full: Path, here: Path, source: str, output: str
) -> None:
    path = here / source
    path.parent.mkdir(parents=True, exist_ok=True)
    full.rename(path)
    assert amkv("compact", source, "--method", "keep").out == f"{output}\n"
    assert (here / output).is_file()


def test_outputs_are_replaced_only_when_that_is_asked_for(amkv: Amkv, full: Path) -> None:
    before = full.read_bytes()
    refused = amkv("prefill", "doc.txt")
    assert refused.code == 2
    assert refused.errors[0] == "error: doc.prefill.amkv already exists"
    assert "--force" in refused.errors[1]
    assert full.read_bytes() == before
    full.write_bytes(b"old")
    assert amkv("prefill", "doc.txt", "--force").code == 0
    with AmkvFile.open(full) as file:
        file.verify()


def test_a_source_is_never_replaced_not_even_by_force(amkv: Amkv, full: Path, here: Path) -> None:
    for words in (("prefill", "doc.txt", "-o", "doc.txt"), ("compact", full, "-o", f"./{full}")):
        before = (here / words[1]).read_bytes()
        done = amkv(*words, "--force")
        assert done.code == 2
        assert "is the source" in done.errors[0]
        assert (here / words[1]).read_bytes() == before


def test_the_last_prefill_is_found_from_another_folder(
    amkv: Amkv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    amkv("prefill", "doc.txt", "-o", "some.prefill.amkv")
    monkeypatch.chdir(tmp_path)
    done = amkv("compact", "--method", "keep")
    assert done.out == "some.amkv\n"
    assert (tmp_path / "some.amkv").is_file()


def test_a_state_folder_that_cannot_be_written_is_no_error(
    amkv: Amkv, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "doc.txt"))
    done = amkv("prefill", "doc.txt")
    assert done.code == 0
    assert "next: amkv compact doc.prefill.amkv --ratio 20" in done.err


def test_a_system_prompt_comes_before_the_document(amkv: Amkv, full: Path) -> None:
    amkv("prefill", "doc.txt", "-o", "s.amkv", "--system", "Answer in one word.")
    with AmkvFile.open("s.amkv") as with_system, AmkvFile.open(full) as without:
        extra = with_system.logical_length - without.logical_length
        assert extra > 0
        starts = [f.manifest["document_start"] for f in (with_system, without)]
        assert starts[0] - starts[1] == extra


def test_odd_file_names_work(amkv: Amkv, here: Path) -> None:
    name = b"a\\b\n\xff c.txt".decode("utf-8", "surrogateescape")
    (here / "doc.txt").rename(here / name)
    assert amkv("prefill", name, "-o", "odd.amkv").code == 0
    with AmkvFile.open("odd.amkv") as file:
        assert file.manifest["source"]["name"] == "a_b__ c.txt"


def test_ratios_may_be_typed_with_an_x(amkv: Amkv, full: Path) -> None:
    done = amkv("compact", full, "--ratio", "5x", "--json", "--method", "highest-attention")
    assert json.loads(done.out)["requested"] == {"ratio": 5.0}


def test_the_defaults_of_the_command_line_are_those_of_the_pipeline(amkv: Amkv) -> None:
    help_text = " ".join(amkv("compact", "--help").out.split())
    assert f"[default: {Request().method}]" in help_text
    assert f"[default: {Request().seed}]" in help_text
    assert Request().method == catalogue.DEFAULT
    for name in catalogue.METHODS:
        assert name in help_text.replace("- ", "-")  # where a line ends at a hyphen


def test_completion_knows_the_commands(process: Amkv) -> None:
    done = process(_AMKV_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="amkv co")
    assert "compact" in done.out
    assert "prefill" not in done.out
