"""Makes the pictures of the terminal in these pages: `python docs/pictures.py FOLDER`.

FOLDER holds handbook.amkv, as `amkv demo --keep FOLDER` leaves it. Every picture is what tmux shows
of a real terminal, with its colours, on a dark and on a light background. Needs tmux.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from rich.text import Text

HERE = Path(__file__).resolve().parent / "pictures"
THEMES = {"dark": SVG_EXPORT_THEME, "light": DEFAULT_TERMINAL_THEME}
AMKV = (sys.executable, "-m", "amcli")
SESSION = "amkv-pictures"
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")

QUESTIONS = (
    "Which code was issued to Kenji Schmidt?",
    "On which channel does the station supplied on 9 August transmit?",
    "/compact",
    "Who was hired as a physicist?",
    "/tokens",
)


def tmux(*words: str) -> str:
    """What a tmux command prints."""
    return subprocess.run(("tmux", *words), check=True, capture_output=True, text=True).stdout


def wait(prompts: int, mark: str, seconds: float = 60) -> str:
    """The screen, colours and all, once `mark` begins so many lines of it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        shown = tmux("capture-pane", "-t", SESSION, "-p", "-e", "-N").rstrip()
        if sum(_ESCAPE.sub("", line).startswith(mark) for line in shown.split("\n")) >= prompts:
            return shown
        time.sleep(0.2)
    raise SystemExit(f"{mark!r} did not show up")


def record(
    folder: Path, command: Sequence[str], typed: Sequence[str], columns: int, rows: int
) -> str:
    """The screen after a command, and after what is typed into it."""
    line = f"printf '\\033[H\\033[2J'; {shlex.join(command)}; echo; echo END"
    path = f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}"  # a running tmux has its own
    where = ("-x", str(columns), "-y", str(rows), "-c", str(folder), "-e", path)
    tmux("new-session", "-d", "-s", SESSION, *where, "sh")
    try:
        tmux("send-keys", "-t", SESSION, "-l", line)
        tmux("send-keys", "-t", SESSION, "Enter")
        for n, text in enumerate(typed, 1):
            wait(n, ">")
            tmux("send-keys", "-t", SESSION, "-l", text)
            tmux("send-keys", "-t", SESSION, "Enter")
        if typed:
            return wait(len(typed) + 1, ">")
        return wait(1, "END").rpartition("END")[0].rstrip()
    finally:
        tmux("kill-session", "-t", SESSION)


def save(shown: str, name: str, said: str, columns: int) -> None:
    """The screen as one SVG for each background, below the command as it would be typed."""
    for theme, colours in THEMES.items():
        console = Console(
            file=io.StringIO(), record=True, width=columns, force_terminal=True,
            color_system="truecolor",
        )  # fmt: skip
        console.print(Text(f"$ {said}", style="bold"))
        console.print(Text.from_ansi(shown))
        drawn = console.export_svg(title="amkv", theme=colours)
        # Fonts from elsewhere are nothing that a picture should ask for.
        drawn = re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)
        (HERE / f"{name}-{theme}.svg").write_text(drawn, encoding="utf-8")


def main() -> None:
    """Makes all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--columns", type=int, default=80)
    args = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    context = "handbook.amkv"
    chat = record(args.folder, (*AMKV, "chat", "-c", context), QUESTIONS, args.columns, 30)
    save(chat, "chat", "amkv chat -c handbook.amkv", args.columns)
    inspect = (*AMKV, "inspect", context)
    heads = record(args.folder, (*inspect, "--heads"), (), args.columns, 40)
    save(heads, "heads", "amkv inspect handbook.amkv --heads", args.columns)
    plot = (*inspect, "-q", "--plot", str(HERE / "plot.png"))
    subprocess.run(plot, cwd=args.folder, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
