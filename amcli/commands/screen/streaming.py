"""An answer on a terminal as it comes: markdown, drawn block by block.

A finished block is printed once and from then on belongs to the terminal's scrollback. Only the
block that still grows is redrawn, and never more of it than the screen holds: redrawing a region
taller than the screen is what makes other tools flicker and lose lines.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable

from rich.console import Console as Screen
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.text import Text

from amcli.commands.screen.terminal import printable
from amcli.system.units import seconds_text

_WIDEST = 100
"""Most columns of text that still read well."""

_MARGIN = 3
"""Columns left free: the ^C that a terminal echoes must not start a new line, which would not be
erased."""

_PER_SECOND = 12


class StreamedMarkdown:
    """Draws the pieces of one answer on standard output; `show` returns once all have come.

    If the pieces end in an exception, what has come so far stays.
    """

    def __init__(self, screen: Screen | None = None):
        self._screen = screen or Screen(file=sys.stdout)
        self._open = ""  # the block that still grows
        self._printed = False
        self._began = time.perf_counter()

    def show(self, pieces: Iterable[str]) -> None:
        """Draws all the pieces."""
        live = Live(
            get_renderable=lambda: self,
            console=self._screen,
            refresh_per_second=_PER_SECOND,
            transient=True,
        )
        try:
            with live:
                for piece in pieces:
                    self._add(printable(piece))
        finally:
            self._print(self._open)
            self._open = ""

    def __rich_console__(self, screen: Screen, options: ConsoleOptions) -> RenderResult:
        """The open block, or its last lines if it is taller than the screen."""
        seconds = time.perf_counter() - self._began
        if not self._open:
            wait = f"… {seconds_text(seconds)}" if seconds >= 1 and not self._printed else ""
            yield Text(wait, style="dim")
            return
        for line in self._lines(self._open)[-max(1, screen.height - 2) :]:
            yield from line
            yield Segment.line()

    def _lines(self, text: str) -> list[list[Segment]]:
        """`text` rendered, without the empty lines around some blocks."""
        width = max(1, min(self._screen.width - _MARGIN, _WIDEST))
        options = self._screen.options.update(width=width, height=None)
        lines = self._screen.render_lines(_markdown(text), options, pad=False)
        shown = [i for i, line in enumerate(lines) if any(s.text.strip() for s in line)]
        return lines[shown[0] : shown[-1] + 1] if shown else []

    def _add(self, text: str) -> None:
        *done, last = blocks(self._open + text)
        if done:
            self._open = ""  # so that it is not drawn below what is printed now
            self._print("".join(done))
        self._open = last

    def _print(self, text: str) -> None:
        """Prints blocks for good, each with one empty line before it."""
        for block in blocks(text):
            lines = self._lines(block)
            if not lines:
                continue
            if self._printed:
                lines.insert(0, [])
            self._printed = True
            drawn = [segment for line in lines for segment in (*line, Segment.line())]
            self._screen.print(Segments(drawn), end="")


def blocks(text: str) -> list[str]:
    """`text` split into blocks, at least one; later text can change only the last."""
    starts = [
        token.map[0]
        for token in Markdown(text).parsed
        if token.level == 0 and token.nesting >= 0 and token.map
    ]
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    ends = [*starts[1:], len(lines)]
    return ["".join(lines[a:b]) for a, b in zip([0, *starts[1:]], ends, strict=True)]


def _markdown(text: str) -> Markdown:
    """Markdown with the model's own line breaks; addresses are text, not clickable links."""
    markdown = Markdown(text, hyperlinks=False)
    for token in markdown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return markdown
