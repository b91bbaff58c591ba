"""How the values of options are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from amcli.errors import UsageError


def _field(option: str) -> str:
    """The name of the argument for an option: `max_tokens` for `--max-tokens`."""
    return option.lstrip("-/").replace("-", "_")


def number(option: str, example: str, least: float = -math.inf) -> Callable[[object], float]:
    """A reader of numbers from `least` up; raises UsageError naming the option and value."""

    def read(value: object) -> float:
        try:
            found = float(str(value).strip().removesuffix("x"))
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise UsageError(
                f"{option} {value} is not a number",
                f"for example {option} {example}",
                field=_field(option),
            )
        if found < least:
            raise UsageError(
                f"{option} {found:g} is below {least:g}",
                f"for example {option} {example}",
                field=_field(option),
            )
        return found

    return read


def number_or(word: str, option: str, example: str, least: float) -> Callable[[object], object]:
    """A reader of numbers from `least` up, and of one word."""
    read = number(option, example, least)
    return lambda value: word if str(value).strip().lower() == word else read(value)


def whole(option: str, example: str, least: int = 0) -> Callable[[object], int]:
    """A reader of whole numbers from `least` up; raises UsageError like `number`."""

    def read(value: object) -> int:
        text = str(value).strip().replace(",", "").replace("_", "")
        try:
            found = int(text)
        except ValueError:
            raise UsageError(
                f"{option} {value} is not a whole number",
                f"for example {option} {example}",
                field=_field(option),
            ) from None
        if found < least:
            raise UsageError(
                f"{option} {found} is below {least}",
                f"for example {option} {example}",
                field=_field(option),
            )
        return found

    return read


_UNITS = "KMGT"


def size(option: str, example: str) -> Callable[[object], int]:
    """A reader of bytes, such as 8GB or 500M; raises UsageError naming the option and value."""

    def read(value: object) -> int:
        text = str(value).strip().upper().replace(" ", "").removesuffix("B")
        step = 1024 if text.endswith("I") else 1000  # GiB or GB
        text = text.removesuffix("I")
        power = _UNITS.find(text[-1:]) + 1 if text else 0
        try:
            found = float(text[:-1] if power else text) * step**power
        except ValueError:
            found = math.nan
        if not (math.isfinite(found) and found >= 1):
            raise UsageError(
                f"{option} {value} is no amount of memory",
                f"for example {option} {example}",
                field=_field(option),
            )
        return int(found)

    return read


def names(option: str, example: str, what: str) -> Callable[[object], list[str]]:
    """A reader of names separated by commas; raises UsageError if there is none."""

    def read(value: object) -> list[str]:
        found = [name.strip() for name in str(value).split(",") if name.strip()]
        if not found:
            raise UsageError(
                f"{option} names no {what}",
                f"for example {option} {example}",
                field=option.lstrip("-"),
            )
        return found

    return read


def ratios(option: str, example: str) -> Callable[[object], list[float]]:
    """A reader of ratios separated by commas, in order, each once; raises UsageError if there is
    none, and like `number`."""
    read_names, read = names(option, example, "ratio"), number(option, example, least=1)
    return lambda value: sorted({read(name) for name in read_names(value)})


def number_or_path(option: str, example: str) -> Callable[[object], object]:
    """A reader of whole numbers from 1 up; anything else is a path."""
    read = whole(option, example, least=1)

    def either(value: object) -> object:
        text = str(value)
        return read(text) if text.lstrip("+-").replace(",", "").isdecimal() else Path(text)

    return either
