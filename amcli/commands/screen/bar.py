"""The progress bar: the current stage, how much of it is done, the time left, the memory used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from amcli.commands.screen.terminal import is_terminal
from amcli.system.units import bytes_text, seconds_text

_BAR = 24
"""Columns of the bar itself: with the text beside it, a line of 80."""


class Bar:
    """A `system.progress.Progress` drawn on stderr, and erased at the end.

    A stage with a total of 0 has no known end: the bar pulses, and the time shown is the time
    taken so far.
    """

    def __init__(self) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(_BAR),
            _Column(_done),
            _Column(_time),
            _Column(lambda task: memory()),
            console=Console(file=sys.stderr),
            transient=True,
            # Results that do not go to this terminal must not be drawn on it.
            redirect_stdout=is_terminal(sys.stdout),
        )
        self._task: TaskID | None = None

    def start(self, stage: str, total: int) -> None:
        """Replaces the current stage with a new one."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(f"{stage:<16}", total=total or None)

    def advance(self, units: int = 1) -> None:
        """Advances the bar of the current stage."""
        if self._task is not None:
            self._bar.advance(self._task, units)

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


class _Column(ProgressColumn):
    """A column whose text a function makes from the stage."""

    max_refresh = 0.5

    def __init__(self, text: Callable[[Task], str]):
        super().__init__()
        self._text = text

    def render(self, task: Task) -> Text:
        """The text, in a quiet style."""
        return Text(self._text(task), style="dim")


def _done(task: Task) -> str:
    return "" if not task.total else f"{task.completed:,.0f}/{task.total:,.0f}"


def _time(task: Task) -> str:
    if task.total and task.time_remaining is not None:
        return f"{seconds_text(task.time_remaining)} left"
    return seconds_text(task.elapsed or 0.0)


def memory() -> str:
    """Memory that this process holds, on the GPU if it uses one; empty if unknown."""
    torch = sys.modules.get("torch")  # not imported just for a bar
    with suppress(AttributeError, RuntimeError):  # torch may be only half imported
        if torch is not None and torch.cuda.is_initialized():
            return f"{bytes_text(torch.cuda.memory_allocated())} GPU"
    with suppress(OSError, ValueError, ImportError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return bytes_text(pages * resource.getpagesize())
    return ""
