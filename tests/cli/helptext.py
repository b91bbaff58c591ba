"""Makes `docs/help.md` from what the commands say of themselves: python tests/cli/helptext.py"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "docs" / "help.md"
COMMANDS: tuple[tuple[str, ...], ...] = (
    (),
    ("prefill",),
    ("compact",),
    ("chat",),
    ("inspect",),
    ("demo",),
)

_INTRODUCTION = """\
# The commands

This page is made from `--help` by `python tests/cli/helptext.py`; a test
compares the two. What `--json` prints is in [json.md](json.md).

Exit codes: 0; 1 unexpected, or the output cannot be written; 2 usage, or an
input that makes no sense; 3 not a valid artifact; 4 an artifact that does not
fit the model; 5 not enough memory or disk; 130 interrupted.
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
    return subprocess.run(
        [sys.executable, "-m", "amcli", *command, "--help"],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


if __name__ == "__main__":
    TARGET.write_text(help_document(), encoding="utf-8", newline="\n")
