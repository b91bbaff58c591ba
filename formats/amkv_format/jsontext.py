"""JSON that may be hostile, and JSON in its one canonical form.

The standard library's `json` does the parsing; this module bounds it first, refuses what it lets
through (duplicate keys, NaN, 1e999, integers of any length) and turns all of its exceptions into
FormatError.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from amkv_format import limits
from amkv_format.errors import Code, FormatError, located

# Control characters would let a file control the terminal that prints it; tab and newline may pass.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def canonical_json(value: object) -> str:
    """`value` as canonical JSON: sorted keys, no spaces, only the escapes JSON demands.

    Raises FormatError (json-number) for NaN and infinities and TypeError for what JSON
    cannot hold.
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except ValueError as error:
        raise FormatError(Code.JSON_NUMBER, str(error)) from None


def parse_json(text: str, origin: int | None = None) -> Any:
    """The value of an untrusted JSON text.

    origin  file offset of the text's first byte, for the errors; None when it has none

    Raises FormatError with one of the `json-` codes.
    """
    with located(origin):
        return _parse(text, origin)


def _parse(text: str, origin: int | None) -> Any:
    separators = sum(text.count(character) for character in ",:[{")
    if separators > limits.MAX_JSON_SEPARATORS:
        raise FormatError(
            Code.JSON_SIZE, f"{separators} separators, more than {limits.MAX_JSON_SEPARATORS}"
        )
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as error:
        offset = None if origin is None else origin + len(text[: error.pos].encode(errors="ignore"))
        raise FormatError(Code.JSON_INVALID, error.msg, offset) from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth_and_strings(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise FormatError(Code.JSON_DUPLICATE, f"the key {key[:80]!r} comes twice")
            seen.add(key)
    return result


def _integer(digits: str) -> int:
    # The length is checked first: converting a long decimal takes quadratic time.
    if len(digits) > limits.MAX_NUMBER_CHARS or abs(value := int(digits)) > limits.MAX_INTEGER:
        raise FormatError(Code.JSON_NUMBER, f"the integer {digits[:40]} is too large")
    return value


def _real(digits: str) -> float:
    if len(digits) > limits.MAX_NUMBER_CHARS:
        raise FormatError(Code.JSON_NUMBER, f"the number {digits[:40]}… is too long")
    value = float(digits)
    if not math.isfinite(value):
        raise FormatError(Code.JSON_NUMBER, f"the number {digits} is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise FormatError(Code.JSON_NUMBER, f"{name} is not a number in JSON")


def _too_deep() -> FormatError:
    return FormatError(Code.JSON_DEPTH, f"nested deeper than {limits.MAX_JSON_DEPTH} levels")


def _check_depth_and_strings(root: Any) -> None:
    """Walks level by level, not by recursion: the answer must not depend on the caller's stack."""
    level: list[Any] = [root]
    depth = 0
    while level:
        depth += 1
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _check_string(value)
            elif isinstance(value, dict | list):
                if depth > limits.MAX_JSON_DEPTH:
                    raise _too_deep()
                below.extend(value.values() if isinstance(value, dict) else value)
                if isinstance(value, dict):
                    below.extend(value)
        level = below


def _check_string(text: str) -> None:
    if found := _FORBIDDEN.search(text):
        raise FormatError(
            Code.JSON_STRING, f"a string holds the character U+{ord(found.group()):04X}"
        )
