"""Signals that end a process unwind it instead, so that no half-written file stays behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGHUP")


class StoppedError(BaseException):
    """A signal has asked the process to end; not an Exception, so that nothing takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        """What a shell would report of a process that the signal has ended."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises StoppedError inside the block when SIGTERM or SIGHUP comes.

    A signal that is ignored, as under nohup, or that somebody else handles is left alone; so are
    all where this is not the main thread.
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
