"""The table of `amkv eval`: as text when it is done, and on the terminal while it grows."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from amcli.console import Console, bytes_text

if TYPE_CHECKING:
    from amcli.evaluation.results import Results

Row = Mapping[str, Any]

_NAMES = {"full": "full context", "none": "no context"}
_KINDS = 5
"""Kinds of question that have columns of their own; with more, only `--json` has them."""

_WIDE = 110
"""Columns of a terminal from which on the live table has all its own."""


def table_text(rows: Sequence[Row]) -> str:
    """The final table: a row for each method and ratio, a line of column heads first."""
    kinds = _kinds(rows)
    lines = [_heads(kinds), *_cells(rows, kinds)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _kinds(rows: Sequence[Row]) -> list[str]:
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in rows) if kind != "all"]
    return kinds if len(kinds) <= _KINDS else []


def _heads(kinds: Sequence[str]) -> list[str]:
    return ["method", "ratio", "real", "stored", "recall", *kinds, "NLL", "KL", "top-1", "seconds"]


def _cells(rows: Sequence[Row], kinds: Sequence[str]) -> list[list[str]]:
    found = {(row["method"], row["ratio"], row["kind"]): row for row in rows}
    lines: list[list[str]] = []
    for row in rows:
        if row["kind"] != "all":
            continue
        same = (row["method"], row["ratio"])
        recalls = [_number(found.get((*same, kind), {}).get("recall")) for kind in kinds]
        name: str = row["method"]
        asked, real = row["ratio"], row["real_ratio"]
        spent = row["seconds"].get("reference", 0.0) + row["seconds"].get("compact", 0.0)
        lines.append(
            [
                _NAMES.get(name, name),
                "" if asked is None else f"{asked:g}×",
                "–" if real is None else f"{real:.1f}×",
                bytes_text(row["stored_bytes"]),
                _interval(row["recall"]),
                *recalls,
                _number(row["nll"]),
                _small(row["kl"]),
                _number(row["agreement"]),
                "" if asked is None else f"{spent:.1f}",
            ]
        )
    return lines


def _number(estimate: Row | None) -> str:
    return "–" if estimate is None else f"{estimate['value']:.3f}"


def _small(estimate: Row) -> str:
    value = estimate["value"]
    return f"{value:.3f}" if value >= 0.001 or not value else f"{value:.0e}"


def _interval(estimate: Row | None) -> str:
    if estimate is None or "low" not in estimate:
        return _number(estimate)
    return f"{estimate['value']:.3f} ({estimate['low']:.2f}–{estimate['high']:.2f})"


class Notes:
    """Tells of a run where nothing can be redrawn: one line a document."""

    def __init__(self, console: Console, documents: int):
        self._console, self._documents = console, documents

    def __enter__(self) -> Notes:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def start(self, stage: str, total: int) -> None:
        """Nothing."""

    def advance(self, units: int = 1) -> None:
        """Nothing."""

    def document(self, index: int, name: str, tokens: int) -> None:
        """A line for each document."""
        self._console.note(f"document {index + 1} of {self._documents}: {name}, {tokens:,} tokens")

    def cell(self, results: Results, method: str, ratio: float | None) -> None:
        """Nothing: the table comes at the end."""


class LiveTable:
    """The table on stderr while it grows, with the stage of the work below; gone at the end.

    Shows means without intervals, over the documents so far. Rows that do not fit on the
    terminal give way to newer ones.
    """

    def __init__(self, documents: int):
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._documents = documents
        self._rows: dict[tuple[str, float | None], list[Row]] = {}
        self._kinds: list[str] = []
        self._document = self._stage = ""
        self._done = self._total = 0
        self._screen = RichConsole(file=sys.stderr)
        self._live = Live(
            console=self._screen, transient=True, refresh_per_second=4, get_renderable=self._render
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
        """A new stage of the work on this document."""
        self._stage, self._done, self._total = stage, 0, total

    def advance(self, units: int = 1) -> None:
        """Some of the stage is done."""
        self._done += units

    def document(self, index: int, name: str, tokens: int) -> None:
        """The next document."""
        self._document = f"document {index + 1} of {self._documents}: {name}, {tokens:,} tokens"

    def cell(self, results: Results, method: str, ratio: float | None) -> None:
        """Works the row of a new cell out again, and puts it last in line to be cut."""
        kinds = list(dict.fromkeys(kind for kinds in results.questions for kind in kinds))
        wanted = ["all", *kinds] if 1 < len(kinds) <= _KINDS else ["all"]
        rows = [results.row(method, ratio, kind, resamples=0) for kind in wanted]
        self._rows.pop((method, ratio), None)
        self._rows[method, ratio] = [row for row in rows if row is not None]
        self._kinds = wanted[1:]

    def _render(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        wide = self._screen.size.width >= _WIDE
        kinds = self._kinds if wide else []
        heads = _heads(kinds)
        shown = [i for i, head in enumerate(heads) if wide or head != "stored"]
        for i in shown:
            table.add_column(heads[i], justify="left" if i == 0 else "right", no_wrap=True)
        room = max(3, self._screen.size.height - 4)
        for rows in list(self._rows.values())[-room:]:
            for line in _cells(rows, kinds):
                table.add_row(*(Text(line[i]) for i in shown))
        share = f" {self._done / self._total:.0%}" if self._total else ""
        return Group(table, Text(f"{self._document} · {self._stage}{share}", overflow="ellipsis"))
