"""Typed access to an untrusted JSON object, with errors that name the field by its path."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from amkv_format import limits
from amkv_format.errors import Code, FormatError

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_SHA256 = re.compile("[0-9a-f]{64}")


class Fields:
    """An object of the manifest at `path`; every getter raises FormatError for a wrong field."""

    def __init__(self, value: object, path: str = ""):
        if not isinstance(value, dict):
            raise _wrong_type(path or "the manifest", "an object", value)
        self._value: dict[str, Any] = value
        self._path = path

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def keys(self) -> Collection[str]:
        """The names of the object's fields."""
        return self._value.keys()

    def path(self, key: str) -> str:
        """The field's name with those of the enclosing objects, such as `model.layers`."""
        return f"{self._path}.{key}" if self._path else key

    def raw(self, key: str) -> Any:
        """The field as it is."""
        if key not in self._value:
            raise FormatError(Code.FIELD_MISSING, f"{self.path(key)} is absent")
        return self._value[key]

    def object(self, key: str) -> Fields:
        """The field as an object."""
        return Fields(self.raw(key), self.path(key))

    def array(self, key: str, low: int = 0, high: int = limits.MAX_LAYERS) -> list[Any]:
        """The field as an array of `low` to `high` items."""
        value = self.raw(key)
        if not isinstance(value, list):
            raise _wrong_type(self.path(key), "an array", value)
        if not low <= len(value) <= high:
            raise FormatError(
                Code.FIELD_VALUE, f"{self.path(key)} has {len(value)} items, not {low} to {high}"
            )
        return value

    def text(self, key: str) -> str:
        """The field as a string of 1 to 256 characters, none of them a control character."""
        return text(self.raw(key), self.path(key))

    def text_or_null(self, key: str) -> str | None:
        """Like `text`, null allowed."""
        return None if self.raw(key) is None else self.text(key)

    def choice(self, key: str, allowed: Collection[str]) -> str:
        """The field as one of the strings `allowed`."""
        return choice(self.raw(key), self.path(key), allowed)

    def integer(self, key: str, low: int, high: int) -> int:
        """The field as an integer from `low` to `high`."""
        return integer(self.raw(key), self.path(key), low, high)

    def bare_name(self, key: str) -> str:
        """The field as text that names a file, without folders."""
        value = self.text(key)
        if value in (".", "..") or "/" in value or "\\" in value:
            raise _wrong_value(self.path(key), "a bare file name", value)
        return value

    def number(self, key: str, zero: bool = False) -> float:
        """The field as an integer or float above zero; with `zero`, zero is allowed too."""
        return number(self.raw(key), self.path(key), zero)

    def sha256(self, key: str, prefix: str = "sha256:") -> str:
        """The field as `prefix` and 64 lowercase hexadecimal digits."""
        value = self.text(key)
        if not value.startswith(prefix) or not _SHA256.fullmatch(value.removeprefix(prefix)):
            raise _wrong_value(self.path(key), f"`{prefix}` and 64 lowercase hex digits", value)
        return value


def text(value: object, path: str) -> str:
    """`value` as a string of 1 to 256 characters, none of them a control character."""
    if not isinstance(value, str):
        raise _wrong_type(path, "a string", value)
    if not 1 <= len(value) <= limits.MAX_NAME_CHARS or _CONTROL.search(value):
        raise _wrong_value(path, "1 to 256 printable characters", value)
    return value


def choice(value: object, path: str, allowed: Collection[str]) -> str:
    """`value` as one of the strings `allowed`."""
    if text(value, path) not in allowed:
        raise _wrong_value(path, "one of " + ", ".join(allowed), value)
    return str(value)


def integer(value: object, path: str, low: int, high: int) -> int:
    """`value` as an integer from `low` to `high`; booleans and floats do not count."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong_type(path, "an integer", value)
    if not low <= value <= high:
        raise _wrong_value(path, f"an integer from {low} to {high}", value)
    return value


def number(value: object, path: str, zero: bool = False) -> float:
    """`value` as an integer or float above zero, or with `zero` also zero; never NaN or infinite,
    which the parser has refused."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong_type(path, "a number", value)
    if value < 0 or not (value or zero):
        raise _wrong_value(path, "a number from 0 on" if zero else "a number above 0", value)
    return value


def items(value: object, path: str, count: int) -> list[Any]:
    """`value` as an array of exactly `count` items."""
    if not isinstance(value, list):
        raise _wrong_type(path, "an array", value)
    if len(value) != count:
        raise FormatError(Code.FIELD_CONFLICT, f"{path} has {len(value)} items, not {count}")
    return value


def _wrong_type(path: str, wanted: str, seen: object) -> FormatError:
    return FormatError(Code.FIELD_TYPE, f"{path} is {_short(seen)}, not {wanted}")


def _wrong_value(path: str, wanted: str, seen: object) -> FormatError:
    return FormatError(Code.FIELD_VALUE, f"{path} is {_short(seen)}, not {wanted}")


def _short(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return repr(value)[:80]
