"""Turns signals that end a process into an exception, so that no half-written file is left."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGHUP")


class StoppedError(BaseException):
    """A signal asked the process to end; not an Exception, so that no handler swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        """The exit status a shell would report for a process ended by the signal."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises StoppedError inside the block when SIGTERM or SIGHUP comes.

    A signal that is ignored, as under nohup, or already handled elsewhere is left alone; outside
    the main thread, all are.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(number)

    before: dict[int, Any] = {}
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with suppress(ValueError):
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
