"""Maps of numbers by layer and KV head, and where kept keys come from, as text for a terminal.

Colours are backgrounds from a ramp that gets steadily lighter, so they read alike on light and dark
screens and for colour-blind readers; without colours, the same steps are digits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from amcli.system.units import error_text
from amkv_format import AmkvFile

RAMP = (53, 54, 55, 24, 30, 36, 72, 77, 148, 226)
"""Colours from a terminal's 256, each lighter than the one before: close to viridis."""

STEPS = len(RAMP)
_UNKNOWN = "·"
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class HeadMap:
    """One number per KV head: `rows[i]` are those of layer `layers[i]`, None if unknown."""

    name: str
    layers: Sequence[int]
    rows: Sequence[Sequence[float | None]]
    whole: bool
    """Whether the numbers are counts."""

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest of the known numbers."""
        known = [v for row in self.rows for v in row if v is not None]
        return (min(known), max(known)) if known else (0.0, 0.0)

    def share(self, value: float) -> float:
        """Where a number lies between smallest and largest, 0 to 1, on a logarithmic scale."""
        low, high = self.range
        # Counts may be 0; errors are small numbers whose ratios matter.
        floor = 1.0 if self.whole else max(low, high * 1e-4, 1e-12)
        low, high, value = (math.log(max(x, floor)) for x in (low, high, value))
        return 0.0 if high <= low else (value - low) / (high - low)

    def step(self, value: float) -> int:
        """The step of the ramp for a number."""
        return min(STEPS - 1, int(self.share(value) * STEPS))

    def text(self, value: float) -> str:
        """A number as text."""
        if self.whole:
            return f"{value:,.0f}"
        return f"{value:.3g}" if value < 1000 else error_text(value)


def maps(artifact: AmkvFile) -> list[HeadMap]:
    """Maps of the entries, and of the errors in the file, for the layers that can be compacted."""
    layers = [i for i, layer in enumerate(artifact.layers) if layer.type == "full"]
    layers = layers or list(range(len(artifact.layers)))
    found = [HeadMap("entries", layers, [list(artifact.layers[i].stored) for i in layers], True)]
    for name, errors in sorted(artifact.manifest.get("fit_errors", {}).items(), reverse=True):
        rows: list[list[float | None]] = [
            list(errors[i]) or [None] * artifact.layers[i].kv_heads for i in layers
        ]
        if any(value is not None for row in rows for value in row):
            found.append(HeadMap(f"{name} error", layers, rows, False))
    return found


def kept_from(artifact: AmkvFile, parts: int) -> list[int] | None:
    """How many entries, over all layers and heads, took their key from each of `parts` equal parts
    of the context; None if the file does not say. Raises FormatError for positions out of range."""
    T = artifact.logical_length
    parts = min(parts, T)
    counts = [0] * parts
    known = False
    for layer in range(len(artifact.layers)):
        positions = artifact.positions(layer)
        if positions is None:
            continue
        known = True
        for position, count in Counter(positions).items():
            if position >= 0:  # -1: from no token
                counts[position * parts // T] += count
    return counts if known else None


def draw(found: Sequence[HeadMap], width: int, colours: bool) -> Iterator[str]:
    """The maps as lines, side by side if the width allows."""
    row: list[HeadMap] = []
    for each in found:
        if row and sum(_width(m) + len(_GAP) for m in row) + _width(each) > width:
            yield from _beside(row, colours)
            yield ""
            row = []
        row.append(each)
    yield from _beside(row, colours)


def strip(counts: Sequence[int], T: int, plain: bool) -> Iterator[str]:
    """Where kept keys come from, as bars along the text; digits where `plain`."""
    top = max(counts)
    marks = "0123456789" if plain else _BARS
    yield f"kept keys along the text, most in one place: {top:,}"
    # Zero is shown as empty, any other count as at least one step.
    steps = [0 if not n else max(1, round(n / top * (len(marks) - 1))) for n in counts]
    yield "".join(marks[step] for step in steps)
    end = f"token {T:,}"
    yield "0" + end.rjust(max(0, len(counts) - 1))


_GAP = "    "


def _beside(row: Sequence[HeadMap], colours: bool) -> Iterator[str]:
    blocks = [list(_block(each, colours)) for each in row]
    for parts in zip_longest(*blocks):
        cells = [part or ("", 0) for part in parts]
        line = ""
        for (text, shown), each in zip(cells, row, strict=True):
            line += text + " " * (_width(each) - shown) + _GAP
        yield line.rstrip()


def _block(found: HeadMap, colours: bool) -> Iterator[tuple[str, int]]:
    """Lines of one map, and how many columns each takes."""
    cell = _cell(found)
    low, high = (found.text(v) for v in found.range)
    yield found.name, len(found.name)
    if cell > 1:
        heads = "".join(str(h).ljust(cell) for h in range(max(map(len, found.rows))))
        yield f"head  {heads}".rstrip(), 6 + len(heads.rstrip())
    for layer, row in zip(found.layers, found.rows, strict=True):
        line = "".join(_paint(found, value, cell, colours) for value in row)
        yield f"{layer:>4}  {line}", 6 + cell * len(row)
    ramp = "".join(_step(step, 1, colours) for step in range(STEPS))
    yield f"{low} {ramp} {high}", len(low) + len(high) + STEPS + 2


def _width(found: HeadMap) -> int:
    low, high = (found.text(v) for v in found.range)
    rows = 6 + _cell(found) * max(map(len, found.rows))
    return max(rows, len(low) + len(high) + STEPS + 2, len(found.name))


def _cell(found: HeadMap) -> int:
    """Columns of a cell: fewer where there are many heads."""
    heads = max(map(len, found.rows))
    return 4 if heads <= 4 else 3 if heads <= 8 else 2 if heads <= 32 else 1


def _paint(found: HeadMap, value: float | None, cell: int, colours: bool) -> str:
    if value is None:
        return _UNKNOWN.ljust(cell)
    return _step(found.step(value), cell, colours)


def _step(step: int, cell: int, colours: bool) -> str:
    if colours:
        return f"\x1b[48;5;{RAMP[step]}m{' ' * cell}\x1b[0m"
    return str(step).ljust(cell)
