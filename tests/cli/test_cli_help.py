"""Help: instant, without torch, and the same in `docs/cli.md` as in the terminal."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from helptext import COMMANDS, TARGET, help_document

from conftest import Amkv

HEAVY = ("torch", "transformers", "numpy", "rich")


def test_the_page_is_what_help_says() -> None:
    # Words, not lines: versions of Typer may break lines in other places.
    assert help_document().split() == TARGET.read_text(encoding="utf-8").split(), (
        "docs/cli.md is out of date: python tests/cli/helptext.py"
    )


def test_help_fits_80_columns() -> None:
    assert max(len(line) for line in help_document().splitlines()) <= 80


def test_help_of_every_command_on_both_flags(amkv: Amkv) -> None:
    for command in COMMANDS:
        long, short = amkv(*command, "--help"), amkv(*command, "-h")
        assert (long.code, long.err) == (0, "")
        assert long.out == short.out


def test_no_command_at_all_shows_the_help(amkv: Amkv) -> None:
    assert amkv().out == amkv("--help").out
    assert amkv().code == 0


def test_the_command_line_is_there_without_anything_heavy(
    here: Path, environment: dict[str, str]
) -> None:
    code = (
        "import sys; from amcli.commands.app import main; main(['--help']);"
        f"sys.exit(' '.join(m for m in {HEAVY} if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stderr == b""
    assert done.returncode == 0


def test_help_is_instant(process: Amkv) -> None:
    def seconds() -> float:
        began = time.perf_counter()
        process("--help")
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 0.5


def test_help_of_every_command_has_an_example() -> None:
    for section in help_document().split("\n## ")[1:]:
        name = section.partition("\n")[0]
        text = section.partition("\nOptions:")[0]
        assert re.search(rf"^    {name}\b", text, re.MULTILINE), f"{name} --help has no example"


def test_version_names_the_libraries_and_imports_none(process: Amkv, here: Path) -> None:
    import torch
    import transformers

    from amcli import __version__

    began = time.perf_counter()
    done = process("--version")
    assert time.perf_counter() - began < 3  # torch alone takes longer
    lines = done.out.splitlines()
    assert lines[0] == f"amkv {__version__}"
    assert f"torch {torch.__version__}" in lines[1]
    assert f"transformers {transformers.__version__}" in lines[1]
    cuda = torch.version.cuda
    assert lines[2].endswith("no CUDA" if cuda is None else f"CUDA {cuda}")
    assert lines[3].startswith("configuration: ")
    assert lines[3].endswith("config.toml (not there)")
