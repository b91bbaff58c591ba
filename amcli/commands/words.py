"""Errors in the words of the command line, by their code.

Below the commands an error speaks of arguments, as the Python API has them. Where what one would
type is called something else, it stands here: templates that `str.format` fills with the facts of
the error. None: the error's own words serve.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from amcli.errors import AmkvError


class Words(NamedTuple):
    """What the command line says of an error; None: what the error says."""

    message: str | None = None
    hint: str | None = None


WORDS: dict[str, Words] = {}

Error = TypeVar("Error", bound=AmkvError)


def spoken(error: Error) -> Error:
    """The error as the command line puts it: of the same class, code, field and facts."""
    words = WORDS.get(error.code or "")
    if words is None:
        return error
    message, hint = error.message, error.hint
    if words.message is not None:
        message = words.message.format(**error.facts)
    if words.hint is not None:
        hint = words.hint.format(**error.facts)
    return type(error)(message, hint, code=error.code, field=error.field, **error.facts)
