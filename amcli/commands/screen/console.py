"""A command's output: data on stdout, everything else on stderr, progress only on terminals.

The one object that commands print through. It knows --json and --quiet, and handles closed pipes
and full disks.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

from amcli.commands.screen.terminal import animated, paint, printable
from amcli.errors import AmkvError, OutOfMemoryError, OutputError
from amcli.system.progress import Progress, Silent


class ReaderGoneError(Exception):
    """The reader of our output has closed it: nothing more to do, and nothing wrong."""


@dataclass
class Switches:
    """Options that may stand before or after the command's name."""

    quiet: bool = False
    debug: bool = False


switches = Switches()
"""The switches of the running command line; `app.main` starts with fresh ones."""


class Console:
    """The destination of a command's results and remarks.

    json   one JSON object on stdout instead of text
    quiet  data only, no remarks and no progress
    """

    def __init__(self, json: bool = False, quiet: bool = False, debug: bool = False):
        switches.quiet |= quiet
        switches.debug |= debug
        self.json = json
        self.quiet = switches.quiet

    def result(self, text: str, record: Mapping[str, Any]) -> None:
        """A command's result on stdout: `record` with --json, otherwise `text`."""
        if self.json:
            self.record(record)
        else:
            self.data(text + "\n")

    def record(self, record: Mapping[str, Any]) -> None:
        """One JSON object as one line on stdout."""
        self.data(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def data(self, text: str) -> None:
        """Text for stdout, written at once; raises ReaderGoneError if nobody reads it any more."""
        _write(sys.stdout, text)

    def note(self, text: str) -> None:
        """A line for people, on stderr."""
        if not self.quiet:
            remark(text)

    def aside(self, text: str) -> None:
        """A piece of the model's thoughts, dimmed, on stderr."""
        if not self.quiet:
            with suppress(ReaderGoneError, AmkvError):
                _write(sys.stderr, paint(printable(text), "2"))

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A `Progress` for long work, shown only on a terminal."""
        if self.quiet or not animated():
            yield Silent()
            return
        from amcli.commands.screen.bar import Bar

        with Bar() as bar:
            yield bar


def report(error: AmkvError) -> None:
    """Prints an error on one line and its hint on another, on stderr."""
    remark(f"{paint('error:', '1;31')} {_one_line(error.message)}")
    if error.hint:
        remark(f"{paint('hint:', '36')} {_one_line(error.hint)}")


def caution(text: str) -> None:
    """Prints a warning's first line on stderr, unless --quiet was given."""
    if not switches.quiet:
        remark(f"{paint('warning:', '33')} {printable(text).splitlines()[0]}")


def remark(text: str) -> None:
    """Prints a line on stderr, even with --quiet; lost if stderr is closed."""
    with suppress(ReaderGoneError, AmkvError):
        _write(sys.stderr, text + "\n")


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # closed by the caller: `amkv … >&-`
        return
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding, stream.errors or "strict")
    except UnicodeEncodeError:
        text = text.encode(encoding, "replace").decode(encoding)
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError as error:
        _detach(stream)
        raise ReaderGoneError from error
    except OSError as error:
        _detach(stream)
        if error.errno == errno.ENOSPC:
            raise OutOfMemoryError(
                "no space left to write the output", "free some space"
            ) from error
        raise OutputError(f"cannot write the output: {error.strerror}") from error


def _detach(stream: TextIO) -> None:
    """Discards what is still in the buffer, which Python would flush again at exit."""
    with suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
