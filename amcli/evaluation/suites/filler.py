"""Long text without facts, and needles hidden in it: what `needle` and `ruler` are made of."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from amcli.evaluation.suites.base import Measure
from amcli.generator import filler


def _words(text: str) -> list[str]:
    return text.split()


_COLOURS = _words("""
amber azure beige black blue bronze brown copper coral cream crimson golden green grey
indigo ivory lilac maroon navy olive orange pink purple red scarlet silver teal violet white
yellow""")
_THINGS = _words("""
anchor apple arrow barrel basket beacon bell boat bottle bridge bucket candle canyon
castle chair clock cloud compass crown drum eagle falcon feather fiddle flag forest fountain garden
glove hammer harbour helmet island jacket kettle ladder lantern maple meadow mirror mountain needle
oven owl paddle pebble pencil piano pillow pocket pumpkin ribbon river rocket saddle sailor shovel
spider stone table teapot temple tiger tower train tunnel turtle umbrella valley violin wagon walnut
window""")


def keys(rng: Random, count: int) -> list[str]:
    """Different names, each two words: `amber lantern`."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{rng.choice(_COLOURS)} {rng.choice(_THINGS)}"] = None
    return list(found)


def words(rng: Random, common: int, others: int) -> tuple[list[str], list[str]]:
    """Different words, in two lists: no word of the first is part of another word."""
    first = rng.sample(_THINGS, common)
    rest = [word for word in _THINGS if word not in first]
    found: dict[str, None] = {}
    while len(found) < others:
        word = "".join(rng.sample(rest, 2))
        if not any(part in word for part in first):
            found[word] = None
    return first, list(found)


def numbers(rng: Random, count: int, digits: int = 7) -> list[str]:
    """Different numbers with that many digits."""
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def sentences(rng: Random, measure: Measure, tokens: int) -> list[str]:
    """Sentences of filler, together (with a space before each) at most `tokens` tokens."""
    found: list[str] = []
    used = 0
    while True:
        batch = [filler.sentence(rng) for _ in range(32)]
        for text, size in zip(batch, measure.count([f" {s}" for s in batch]), strict=True):
            if used + size > tokens:
                return found
            used += size
            found.append(text)


def hide(
    rng: Random, measure: Measure, tokens: int, needles: Sequence[str], depths: Sequence[float]
) -> str:
    """Filler with each needle placed after the share of sentences given in `depths` (0 to 1).

    At most `tokens` tokens, unless the needles alone are longer.
    """
    room = tokens - sum(measure.count([f" {needle}" for needle in needles]))
    hay = sentences(rng, measure, room)
    places = [round(depth * len(hay)) for depth in depths]
    order = sorted(range(len(needles)), key=lambda i: places[i])
    text: list[str] = []
    start = 0
    for i in order:
        text += [*hay[start : places[i]], needles[i]]
        start = places[i]
    return " ".join([*text, *hay[start:]])
