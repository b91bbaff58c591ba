"""What the shell offers after Tab, in bash, zsh and fish; and that it knows what the tool knows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from amcli.commands.app import main
from conftest import Amkv

Offered = Callable[..., list[str]]


@pytest.fixture
def told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], str]:
    """What a shell is told for the words typed so far."""

    def run(typed: str, shell: str) -> str:
        words = typed.split(" ")
        monkeypatch.setenv("_AMKV_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", typed)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        with pytest.raises(SystemExit):
            main([])
        return capsys.readouterr().out

    return run


@pytest.fixture
def offered(told: Callable[[str, str], str]) -> Offered:
    """The words that are offered."""

    def run(typed: str, shell: str = "zsh") -> list[str]:
        out = told(typed, shell)
        if shell == "zsh":
            return re.findall(r'^(?:_arguments .*\(\()?"([^"]+)"', out, re.MULTILINE)
        return [line.partition("\t")[0] for line in out.splitlines()]

    return run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_methods_and_artifacts(offered: Offered, here: Path, compact: Path, shell: str) -> None:
    (here / "data").mkdir()
    assert offered("amkv compact --method am-", shell) == ["am-highest-attention", "am-omp"]
    assert offered("amkv chat --context d", shell) == ["doc.amkv", "data/"]
    assert offered("amkv inspect doc", shell) == ["doc.amkv"]
    assert offered("amkv comp", shell) == ["compact"]
    assert "--trust-remote-code" in offered("amkv prefill --tr", shell)


def test_lists_models_and_folders(
    offered: Offered, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert offered("amkv eval --method omp,tov") == ["omp,tova"]
    sources = ["repeat", "repeat-parts", "repeat+quotes+self-study"]
    assert offered("amkv compact --queries rep") == sources
    (here / "cache" / "models--Qwen--Qwen3-4B").mkdir(parents=True)
    (here / "pony").mkdir()
    (here / "pony" / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "cache"))
    assert offered("amkv prefill --model Q") == ["Qwen/Qwen3-4B"]
    assert offered("amkv prefill --model po") == ["pocket", "pony"]


def test_documents_are_left_to_the_shell(told: Callable[[str, str], str]) -> None:
    assert told("amkv prefill do", "zsh").strip() == "_files"


def test_a_broken_configuration_breaks_no_completion(
    offered: Offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "amkv").mkdir()
    (tmp_path / "amkv" / "config.toml").write_text("ration = 3")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert offered("amkv compact --store i") == ["int8", "int4"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_each_shell(process: Amkv, shell: str) -> None:
    done = process(_AMKV_COMPLETE=f"source_{shell}")
    assert done.code == 0
    assert "_AMKV_COMPLETE" in done.out
    assert os.linesep in done.out
