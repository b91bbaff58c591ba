"""The table of `amkv eval`: as text at the end, and live on the terminal while it grows."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from amcli.commands.screen.console import Console
from amcli.system.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from amcli.evaluation.results import Results

Row = Mapping[str, Any]

_NAMES = {"full": "full context", "none": "no context"}
_KINDS = 5
"""Most kinds of question that get columns of their own; with more, only `--json` shows them."""

_WIDE = 120
"""Terminal width from which on the live table shows all its columns."""


def table_text(rows: Sequence[Row], width: int | None = None) -> str:
    """The final table: a row for each method and ratio, below a line of column heads.

    Columns that do not fit into `width` are left out, if that helps.
    """
    text = _text(rows, _columns(rows))
    if width is None or max(map(len, text.splitlines())) <= width:
        return text
    return _text(rows, [column for column in _columns(rows) if not column.wide])


def _text(rows: Sequence[Row], columns: Sequence[_Column]) -> str:
    lines = [[column.head for column in columns], *_cells(rows, columns)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


@dataclass(frozen=True)
class _Column:
    """A column: its head, and its cell for a row; `wide` ones are dropped on a small terminal."""

    head: str
    cell: Callable[[Row], str]
    wide: bool = False


def _columns(rows: Sequence[Row]) -> list[_Column]:
    """The columns for which these rows have values."""
    measured = {name for row in rows for name, value in row.items() if value is not None}
    of_kinds = "recall" if "recall" in measured else "lost"
    found = {(row["method"], row["ratio"], row["kind"]): row for row in rows}

    def of_kind(kind: str) -> _Column:
        def cell(row: Row) -> str:
            return _number(found.get((row["method"], row["ratio"], kind), {}).get(of_kinds))

        return _Column(kind, cell, wide=True)

    def metric(head: str, name: str, show: Callable[[Row | None], str], wide: bool = False) -> None:
        if name in measured:
            columns.append(_Column(head, lambda row: show(row[name]), wide))

    columns = [
        _Column("method", lambda row: str(_NAMES.get(row["method"], row["method"]))),
        _Column("ratio", lambda row: "" if row["ratio"] is None else f"{row['ratio']:g}×"),
        _Column("real", lambda row: _times(row["real_ratio"])),
        _Column("stored", lambda row: bytes_text(row["stored_bytes"]), wide=True),
    ]
    metric("recall", "recall", _interval)
    metric("lost", "lost", _interval if of_kinds == "lost" else _number)
    columns += map(of_kind, _kinds(rows))
    metric("same", "same", _number)
    metric("F1", "f1", _number, wide=True)
    metric("contains", "contains", _number, wide=True)
    metric("NLL", "nll", _number, wide=True)
    metric("KL", "kl", _small)
    metric("top-1", "agreement", _number)
    columns.append(_Column("seconds", _seconds))
    if "prefills" in measured:
        columns.append(_Column("prefills", lambda row: _tenths(row["prefills"]), wide=True))
    return columns


def _kinds(rows: Sequence[Row]) -> list[str]:
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in rows) if kind != "all"]
    return kinds if len(kinds) <= _KINDS else []


def _cells(rows: Sequence[Row], columns: Sequence[_Column]) -> list[list[str]]:
    return [[c.cell(row) for c in columns] for row in rows if row["kind"] == "all"]


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f}×"


def _tenths(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _seconds(row: Row) -> str:
    """The time to make the context, after the prefill."""
    spent = sum(s for name, s in row["seconds"].items() if name not in ("prefill", "questions"))
    return "" if row["ratio"] is None else f"{spent:.1f}"


def _value(estimate: Row | None) -> float | None:
    """NaN if the measured value is not finite, None if nothing was measured."""
    if estimate is None:
        return None
    return math.nan if estimate["value"] is None else float(estimate["value"])


def _number(estimate: Row | None) -> str:
    value = _value(estimate)
    return "–" if value is None else f"{value:.3f}"


def _small(estimate: Row | None) -> str:
    value = _value(estimate)
    return f"{value:.0e}" if value and value < 0.001 else _number(estimate)


def _interval(estimate: Row | None) -> str:
    if estimate is None or estimate.get("low") is None or estimate.get("high") is None:
        return _number(estimate)
    return f"{_number(estimate)} ({estimate['low']:.2f}–{estimate['high']:.2f})"


class Pace:
    """Estimates a run's remaining time from its cells so far, weighted by document length."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._before: float | None = None

    def left(self, results: Results) -> float | None:
        """Seconds left, roughly; None before there is anything to go by."""
        tokens = [document["tokens"] for document in results.documents]
        done = sum(tokens[document] for document, *_ in results.cells)
        todo = sum(tokens[i] * len(results.todo(i)) for i in range(len(tokens)))
        if self._before is None:  # cells from before this run took none of its time
            self._before, self._began = done, time.monotonic()
            return None
        mine = done - self._before
        return (time.monotonic() - self._began) * todo / mine if mine else None


class Notes:
    """Reports a run where nothing can be redrawn: one line per document."""

    def __init__(self, console: Console, results: Results):
        self._console, self._results = console, results
        self._pace = Pace()
        self._pace.left(results)

    def __enter__(self) -> Notes:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def start(self, stage: str, total: int) -> None:
        """Nothing."""

    def advance(self, units: int = 1) -> None:
        """Nothing."""

    def document(self, index: int, name: str, tokens: int) -> None:
        """Prints a line for each document, with the time left."""
        count = len(self._results.documents)
        left = self._pace.left(self._results)
        more = "" if left is None else f", about {seconds_text(left)} left"
        self._console.note(f"document {index + 1} of {count}: {name}, {tokens:,} tokens{more}")

    def cell(self, results: Results, method: str, ratio: float | None) -> None:
        """Nothing: the table comes at the end."""


class LiveTable:
    """The growing table on stderr, with the current stage below it; removed at the end.

    Shows means without intervals, over the documents so far. If the rows do not fit on the
    terminal, newer ones replace older ones.
    """

    def __init__(self, results: Results):
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._documents = len(results.documents)
        self._rows: dict[tuple[str, float | None], list[Row]] = {}
        self._pace = Pace()
        self._pace.left(results)
        self._left = ""
        self._document = self._stage = ""
        self._done = self._total = 0
        self.screen = RichConsole(file=sys.stderr)
        self._live = Live(
            console=self.screen, transient=True, refresh_per_second=4, get_renderable=self.render
        )

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def start(self, stage: str, total: int) -> None:
        """Begins a stage of the work on this document."""
        self._stage, self._done, self._total = stage, 0, total

    def advance(self, units: int = 1) -> None:
        """Counts part of the stage as done."""
        self._done += units

    def document(self, index: int, name: str, tokens: int) -> None:
        """The next document."""
        self._document = f"document {index + 1} of {self._documents}: {name}, {tokens:,} tokens"

    def cell(self, results: Results, method: str, ratio: float | None) -> None:
        """Recomputes the row of a new cell, and makes it the last to be cut."""
        kinds = list(dict.fromkeys(kind for kinds in results.questions for kind in kinds))
        wanted = ["all", *kinds] if 1 < len(kinds) <= _KINDS else ["all"]
        rows = [results.row(method, ratio, kind, resamples=0) for kind in wanted]
        self._rows.pop((method, ratio), None)
        self._rows[method, ratio] = [row for row in rows if row is not None]
        left = self._pace.left(results)
        self._left = "" if left is None else f" · about {seconds_text(left)} left"

    def render(self) -> Any:
        """The current table, as much of it as fits on the screen."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        wide = self.screen.size.width >= _WIDE
        room = max(3, self.screen.size.height - 4)
        rows = [row for rows in list(self._rows.values())[-room:] for row in rows]
        columns = [column for column in _columns(rows) if wide or not column.wide]
        for i, column in enumerate(columns):
            table.add_column(column.head, justify="left" if i == 0 else "right", no_wrap=True)
        for line in _cells(rows, columns):
            table.add_row(*map(Text, line))
        share = f" {self._done / self._total:.0%}" if self._total else ""
        now = f"{self._document} · {self._stage}{share}{self._left}"
        return Group(table, Text(now, overflow="ellipsis"))
