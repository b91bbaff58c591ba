"""Numbers out of a model's weights: whether two files, or a file and a model, have the same.

Numbers are compared within rounding, since the same weights are loaded in several dtypes; section
4 of `amkv-v1.md` says how.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """How many numbers were compared, how many differ, and the first of these in words."""

    compared: int = 0
    differing: int = 0
    example: str = ""


def compare_weights(file: Mapping[str, str] | None, model: Mapping[str, str] | None) -> Comparison:
    """The numbers of a file next to those of a model, or of another file, as far as both have
    them; `weights` of a manifest that has been checked."""
    compared, differing, example = 0, 0, ""
    theirs_of, ours_of = file or {}, model or {}
    for group in sorted(theirs_of.keys() & ours_of.keys()):
        theirs, ours = _numbers(theirs_of[group]), _numbers(ours_of[group])
        if len(theirs) != len(ours):
            continue
        for a, b in zip(theirs, ours, strict=True):
            if not (math.isfinite(a) and math.isfinite(b)):
                continue
            compared += 1
            if not same_weight(a, b):
                differing += 1
                example = example or f"{group.rpartition(' ')[0]}: file {a:.6g}, model {b:.6g}"
    return Comparison(compared, differing, example)


def same_weight(a: float, b: float) -> bool:
    """Whether two numbers may be one number, rounded to bfloat16 and to float16."""
    least = min(abs(a), abs(b))
    exponent = math.frexp(least)[1] - 1
    rounding = 9 / 8 * math.ldexp(1.0, exponent - 8) if least else 0.0
    return abs(a - b) <= rounding + 2.0**-24


def _numbers(text: str) -> tuple[float, ...]:
    return struct.unpack(f">{len(text) // 8}f", bytes.fromhex(text))
