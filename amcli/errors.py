"""The one tree of errors a user can see, each class with its exit code.

An error says what is wrong with the value that was seen (`message`) and what to do next (`hint`),
in the words of the Python API. What a program goes by is its `code`, and `field`: the argument it
is about. `commands.failures` turns these into the words of the command line.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Self


class AmkvError(Exception):
    """Base of every error that is reported as one line; exit code 1.

    code   what is wrong, as one word of several parts such as `ratio-below-1`; the same for
           every value that is wrong in that way. None: nothing that a program would act on
    field  name of the argument that is wrong, as the Python API has it; None: none
    place  where it was found, such as a line of a file; the message begins with it
    facts  the values that the message and the hint are made of, by name
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        *,
        code: str | None = None,
        field: str | None = None,
        place: str | None = None,
        **facts: object,
    ):
        self.message = message if place is None else f"{place}: {message}"
        super().__init__(self.message)
        self.hint = hint
        self.code = code
        self.field = field
        self.place = place
        self.facts = facts
        self._bare = message

    def at(self, place: str) -> Self:
        """The same error with where it was found."""
        return self._again(self._bare, self.hint, place)

    def worded(self, message: str | None, hint: str | None) -> Self:
        """The same error in other words; None: its own."""
        return self._again(message or self._bare, hint or self.hint, self.place)

    def _again(self, message: str, hint: str | None, place: str | None) -> Self:
        return type(self)(
            message, hint, code=self.code, field=self.field, place=place, **self.facts
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross the border between processes, and keyword arguments are not in `args`.
        how: dict[str, Any] = {
            "code": self.code,
            "field": self.field,
            "place": self.place,
            **self.facts,
        }
        return partial(type(self), self._bare, self.hint, **how), ()


class UsageError(AmkvError):
    """An argument or an input file is wrong; exit code 2."""

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


class AmkvWarning(UserWarning):
    """What a user should see though nothing fails; warnings of libraries are another thing."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """How a hint begins when a name is near a known one; empty when none is."""
    import difflib

    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
