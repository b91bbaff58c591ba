"""The one tree of errors a user can see, each class with its exit code.

An error names what is wrong with the value that was seen (`message`) and the next
thing to type (`hint`). Commands never print a traceback for these; `cli.main` turns
them into one line and the exit code.
"""

from __future__ import annotations

from collections.abc import Iterable


class AmkvError(Exception):
    """Base of every error that is reported as one line; exit code 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AmkvError):
    """The command line or an input file is wrong; exit code 2."""

    exit_code = 2


class ArtifactError(AmkvError):
    """A file is not a valid `.amkv` artifact; exit code 3."""

    exit_code = 3


class ModelMismatchError(AmkvError):
    """An artifact does not fit the model at hand; exit code 4."""

    exit_code = 4


class OutOfMemoryError(AmkvError):
    """Not enough memory on the device or on the disk; exit code 5."""

    exit_code = 5


class OutputError(AmkvError):
    """The output cannot be written (permission, full disk, missing folder); exit code 1."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """How a hint begins when a name is near a known one; empty when none is."""
    import difflib

    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
