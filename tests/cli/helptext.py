"""Makes `docs/cli.md` from what the commands say of themselves: python tests/cli/helptext.py"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

from typer.main import get_command

from amcli.commands.app import app

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "docs" / "cli.md"
COMMANDS: tuple[tuple[str, ...], ...] = ((), *((name,) for name in get_command(app).commands))
"""Words after `amkv`: none, and each command."""

_INTRODUCTION = """\
# The commands

This page is made from `--help` by `python tests/cli/helptext.py`; a test
compares the two. Variables and the configuration file are in
[configuration.md](configuration.md), what `--json` prints in
[json.md](json.md).

Exit codes: 0; 1 unexpected, or the output cannot be written; 2 usage, or an
input that makes no sense; 3 not a valid artifact; 4 an artifact that does not
fit the model; 5 not enough memory or disk; 130 interrupted,
143 terminated.
"""


@functools.cache
def help_document() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for command in COMMANDS:
        words = " ".join(("amkv", *command))
        parts.append(f"## {words}\n\n```text\n{_help(command)}```\n")
    return "\n".join(parts)


def _help(command: tuple[str, ...]) -> str:
    path = os.pathsep.join((str(ROOT), str(ROOT / "formats"), os.environ.get("PYTHONPATH", "")))
    plain = {"PYTHONPATH": path, "COLUMNS": "80", "NO_COLOR": "1", "XDG_CONFIG_HOME": os.devnull}
    return subprocess.run(
        [sys.executable, "-m", "amcli", *command, "--help"],
        env={**os.environ, **plain},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def documented(command: str) -> set[str]:
    """Names of the fields that a command prints with --json, by `docs/json.md`."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    section = text.partition(f"## `amkv {command} --json`")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    as_above = re.findall(r"^`[^|]*? as above, and:$|^A compact artifact.*$", section, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", " ".join([*first_cells, *as_above])))


if __name__ == "__main__":
    TARGET.write_text(help_document(), encoding="utf-8", newline="\n")
