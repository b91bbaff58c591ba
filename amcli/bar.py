"""The progress bar: which stage it is, how much of it is done, how long it will take."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Bar:
    """A `pipeline.progress.Progress` drawn on stderr, and wiped away at the end.

    A stage with a total of 0 has no end in sight: the bar pulses.
    """

    def __init__(self) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TimeRemainingColumn(compact=True),
            console=Console(file=sys.stderr),
            transient=True,
            redirect_stdout=False,  # rich would open one that the caller has closed
        )
        self._task: TaskID | None = None

    def start(self, stage: str, total: int) -> None:
        """A new stage takes the place of the one before."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(
            f"{stage:<16}", total=total or None, done="  0%" if total else ""
        )

    def advance(self, units: int = 1) -> None:
        """Moves the bar of the current stage on."""
        if self._task is None:
            return
        self._bar.advance(self._task, units)
        percentage = self._bar.tasks[-1].percentage
        self._bar.update(self._task, done=f"{percentage:3.0f}%")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
