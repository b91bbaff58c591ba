"""What a stream can show: whether a person sees it, colours, width; and text safe for it."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees what is written to it."""
    return stream is not None and not stream.closed and stream.isatty()


def styled(stream: TextIO | None) -> bool:
    """Whether that is a terminal that can move its cursor and redraw a line."""
    return is_terminal(stream) and os.environ.get("TERM") not in ("dumb", "unknown")


def animated() -> bool:
    """Whether stderr is such a terminal."""
    return styled(sys.stderr)


def coloured(stream: TextIO | None) -> bool:
    """Whether output may have colours: it goes to a terminal, and NO_COLOR is not set."""
    return styled(stream) and not os.environ.get("NO_COLOR")


def paint(text: str, code: str, stream: TextIO | None = None) -> str:
    """`text` in a colour, if the stream (None: stderr) may have colours."""
    may = coloured(sys.stderr if stream is None else stream)
    return f"\x1b[{code}m{text}\x1b[0m" if may else text


def columns(stream: TextIO | None) -> int:
    """How wide output may be: the terminal's width, 80 for anything else."""
    if not is_terminal(stream):
        return 80
    return shutil.get_terminal_size().columns


def printable(text: str) -> str:
    """`text` without control characters: a document must not be able to control the terminal."""
    return "".join(c for c in text if c in "\n\t" or not _is_control(c))


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character <= "\x9f"
