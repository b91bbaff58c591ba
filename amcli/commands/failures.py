"""Turns any exception into one of our errors, with a message and a hint.

Importing this module must stay fast: no torch or transformers in anything it imports.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import typer

from amcli.commands.words import spoken
from amcli.errors import AmkvError, OutOfMemoryError, UsageError

# BadParameter is the only usage error that Typer exports; all usage errors share its base.
TyperUsageError: type[Exception] = typer.BadParameter.__bases__[0]


def as_amkv_error(error: Exception, typed: Sequence[str] = ()) -> AmkvError:
    """What to tell the user about any exception. typed  the words of the command line"""
    if isinstance(error, AmkvError):
        found = spoken(error)
        if error.code == "model-moved" and typed:
            place = str(error.facts["now"] or "FOLDER")
            line = shlex.join(["amkv", *typed, "--model", place])
            found = found.worded(None, f"say where it is now: {line}")
        return found
    if isinstance(error, TyperUsageError):
        return _usage_error(error)
    if _out_of_memory(error):
        return OutOfMemoryError(
            "out of memory", "try a shorter document, --dtype bfloat16, or --device cpu"
        )
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return AmkvError(f"unexpected {what}", "add --debug to see where it comes from")


def _usage_error(error: Exception) -> UsageError:
    """Typer's own complaint about the command line as one of our errors."""
    context = getattr(error, "ctx", None)
    path = "amkv" if context is None else context.command_path
    near = getattr(error, "possibilities", None)
    message = getattr(error, "message", "") if near is not None else ""
    message = message or error.format_message()  # type: ignore[attr-defined]
    text, _, meant = message.strip().rstrip(".").partition(". Did you mean ")
    hint = f"{path} --help"
    if near:
        hint = f"did you mean {', '.join(sorted(near))}? see {hint}"
    elif meant:
        hint = f"did you mean {meant} see {hint}"
    field = getattr(getattr(error, "param", None), "name", None)
    return UsageError(text[:1].lower() + text[1:], hint, field=field)


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    failures = sys.modules.get("amcli.models.failures")  # loaded wherever torch is
    return failures is not None and bool(failures.out_of_memory(error))
