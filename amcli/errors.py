"""All errors that a user can see, each class with its exit code.

An error says what is wrong with the given value (`message`) and what to do next (`hint`), in the
words of the Python API. Programs go by its `code` and `field`, the argument it is about.
`commands.words` puts it in the words of the command line.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Self


class AmkvError(Exception):
    """Base of every error reported as one line; exit code 1.

    code   what is wrong, as a hyphenated name such as `ratio-below-1`; the same for every value
           that is wrong in that way. None: nothing that a program would act on
    field  name of the wrong argument in the Python API; None: not about one argument
    place  where it was found, such as a line of a file; the message begins with it
    facts  the values used in the message and the hint, by name
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
        """The same error with the place where it was found."""
        return self._again(self._bare, self.hint, place)

    def worded(self, message: str | None, hint: str | None) -> Self:
        """The same error in other words; None keeps its own."""
        return self._again(message or self._bare, hint or self.hint, self.place)

    def _again(self, message: str, hint: str | None, place: str | None) -> Self:
        return type(self)(
            message, hint, code=self.code, field=self.field, place=place, **self.facts
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Errors are passed between processes, and `args` does not include keyword arguments.
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
    """An artifact does not fit the model in use; exit code 4."""

    exit_code = 4


class OutOfMemoryError(AmkvError):
    """Not enough memory on the device or on the disk; exit code 5."""

    exit_code = 5


class OutputError(AmkvError):
    """The output cannot be written (permission, full disk, missing folder); exit code 1."""

    exit_code = 1


class AmkvWarning(UserWarning):
    """What a user should see although nothing fails; unlike warnings of libraries."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The start of a hint if a name is close to a known one; otherwise empty."""
    import difflib

    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
