"""The document generator: registers and handbooks full of facts, each from one seed.

A document is a list of blocks (paragraphs, lists, tables, headings), each with the facts it
states, so it can be cut to a length and the facts left in it are still known. Knows nothing of
models or tokenizers: the caller passes a function that measures lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from amcli.generator import filler
from amcli.generator import words as w
from amcli.generator.schema import ENTITIES, PERSON, SERVICE, SITE, Attribute, Kind


@dataclass(frozen=True)
class Fact:
    """The `attribute` of entity `subject` is `value`."""

    kind: Kind
    subject: str
    attribute: Attribute
    value: str


@dataclass(frozen=True)
class Block:
    """A piece of text between blank lines, and the facts it states."""

    text: str
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class Document:
    """A generated document: its text and every fact in it, in order."""

    title: str
    text: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class _Entity:
    kind: Kind
    name: str
    short: tuple[str, ...]  # what may stand for the name in later sentences of one paragraph
    facts: tuple[tuple[Attribute, str], ...]


_HEADINGS = {
    "person": ("People", "Colleagues", "Who is who", "Staff", "New faces", "The crew", "Residents"),
    "service": ("Services", "Systems", "Servers and services", "What runs where"),
    "site": ("Stations", "Outposts", "Sites", "Along the coast"),
    "team": ("Teams", "Groups", "How we are organised"),
    "filler": (
        "House rules",
        "Good to know",
        "Safety",
        "Daily life",
        "Odds and ends",
        "Practical notes",
    ),
}

_KIND_WEIGHTS = (70, 12, 10, 8)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


class _World:
    """Everything that exists in one document so far: names and values in use."""

    def __init__(self, rng: Random):
        self.rng = rng
        self.names: set[str] = set()
        self.people: list[str] = []
        self.values: dict[str, set[str]] = {}

    def _person(self) -> tuple[str, tuple[str, ...]]:
        rng = self.rng
        feminine = rng.random() < 0.5
        first = rng.choice(w.FIRST_F if feminine else w.FIRST_M)
        if rng.random() < 0.08:
            first = w.coined(rng, 2)
        last = w.coined(rng, rng.randint(2, 3)) if rng.random() < 0.2 else rng.choice(w.LAST)
        return f"{first} {last}", ("She" if feminine else "He", first)

    def _name(self, kind: Kind) -> tuple[str, tuple[str, ...]]:
        rng = self.rng
        if kind is PERSON:
            return self._person()
        pool = {"service": w.SERVICES, "site": w.SITES, "team": w.TEAMS}[kind.name]
        word = w.coined(rng, 2) if rng.random() < 0.2 else rng.choice(pool)
        if kind is SERVICE:
            return f"the {word} service", ("It", "The service")
        if kind is SITE:
            return f"{word} station", ("It", "The station")
        return f"the {word} team", ("It", "The team")

    def _value(self, attribute: Attribute) -> str | None:
        """A value that no other entity of this document has, if the pool allows."""
        if attribute.value is None:
            return self.rng.choice(self.people) if self.people else None
        taken = self.values.setdefault(attribute.name, set())
        value = attribute.value(self.rng)
        for _ in range(12):
            if value not in taken or not attribute.reverse:
                break
            value = attribute.value(self.rng)
        taken.add(value)
        return value

    def entity(self, kind: Kind) -> _Entity:
        """A new entity with a name of its own and a few attributes."""
        name, short = self._name(kind)
        while name in self.names:
            name, short = self._name(kind)
        self.names.add(name)
        count = self.rng.randint(kind.fewest, kind.most)
        facts = []
        for attribute in self.rng.sample(kind.attributes, count):
            value = self._value(attribute)
            if value is not None:
                facts.append((attribute, value))
        if kind is PERSON:
            self.people.append(name)
        return _Entity(kind, name, short, tuple(facts))


def _facts(entity: _Entity, pairs: list[tuple[Attribute, str]]) -> tuple[Fact, ...]:
    return tuple(Fact(entity.kind, entity.name, a, v) for a, v in pairs)


def _sentence(rng: Random, subject: str, attribute: Attribute, value: str, full: bool) -> str:
    wordings = attribute.sentences
    if full and rng.random() < 0.25:
        wordings = attribute.named
    return _capital(rng.choice(wordings).format(s=subject, v=value))


def _prose(rng: Random, entity: _Entity, pairs: list[tuple[Attribute, str]]) -> str:
    """A paragraph about one entity; after the first sentence a pronoun may stand for it."""
    sentences: list[str] = []
    todo = list(pairs)
    while todo:
        attribute, value = todo.pop(0)
        full = not sentences or rng.random() < 0.4
        subject = entity.name if full else rng.choice(entity.short)
        if todo and rng.random() < 0.3:  # two facts in one sentence
            other, second = todo.pop(0)
            head = rng.choice(attribute.sentences).format(s=subject, v=value)
            tail = rng.choice(other.sentences).format(s="", v=second).strip()
            sentences.append(f"{_capital(head[:-1])} and {tail}")
        else:
            sentences.append(_sentence(rng, subject, attribute, value, full))
        if rng.random() < 0.06:
            sentences.append(filler.sentence(rng))
    return " ".join(sentences)


def _line(rng: Random, entity: _Entity, pairs: list[tuple[Attribute, str]], style: int) -> str:
    """One entry of a register in one of six layouts."""
    name = _capital(entity.name)
    short = [a.field[1].format(v=v) for a, v in pairs]
    long = [f"{a.field[0]}: {v}" for a, v in pairs]
    return (
        f"- {name}: {', '.join(short)}",
        f"{name} — {'; '.join(short)}.",
        f"{name} | {' | '.join(long)}",
        f"* {name} ({'; '.join(long)})",
        f"{name}\n" + "\n".join(f"  {item}" for item in long),
        f"{name}, {', '.join(short)}.",
    )[style]


def _table(entities: list[_Entity]) -> str:
    """A markdown table over the attributes that occur."""
    columns: list[Attribute] = []
    for entity in entities:
        columns += [a for a, _ in entity.facts if a not in columns]
    rows = ["| name | " + " | ".join(a.field[0] for a in columns) + " |"]
    rows.append("|" + " --- |" * (len(columns) + 1))
    for entity in entities:
        values = dict(entity.facts)
        cells = " | ".join(values.get(a, "–") for a in columns)
        rows.append(f"| {_capital(entity.name)} | {cells} |")
    return "\n".join(rows)


def _scattered(rng: Random, entities: list[_Entity]) -> Iterator[Block]:
    """Mixed facts of several entities: every sentence names its subject."""
    facts = [f for e in entities for f in _facts(e, list(e.facts))]
    rng.shuffle(facts)
    while facts:
        count = rng.randint(3, 6)
        part, facts = facts[:count], facts[count:]
        text = " ".join(_sentence(rng, f.subject, f.attribute, f.value, True) for f in part)
        yield Block(text, tuple(part))


def _chapter(rng: Random, world: _World, dry: float) -> Iterator[Block]:
    """A heading and some entities in one layout, with `dry` filler paragraphs between."""
    kind = rng.choices(ENTITIES, _KIND_WEIGHTS)[0]
    entities = [world.entity(kind) for _ in range(rng.randint(3, 8))]
    if rng.random() < 0.7:
        yield Block(rng.choice(("## ", "")) + rng.choice(_HEADINGS[kind.name]))
    layout = rng.choices(("prose", "lines", "table", "scattered"), (50, 25, 8, 17))[0]
    if layout == "prose":
        for entity in entities:
            if rng.random() < dry:
                yield Block(filler.paragraph(rng))
            yield Block(_prose(rng, entity, list(entity.facts)), _facts(entity, list(entity.facts)))
    elif layout == "lines":
        style = rng.randrange(6)
        rows = [_line(rng, e, list(e.facts), style) for e in entities]
        facts = tuple(f for e in entities for f in _facts(e, list(e.facts)))
        yield Block("\n".join(rows), facts)
    elif layout == "table":
        entities = entities[:5]
        facts = tuple(f for e in entities for f in _facts(e, list(e.facts)))
        yield Block(_table(entities), facts)
    else:
        yield from _scattered(rng, entities)
    if rng.random() < dry:
        if rng.random() < 0.3:
            yield Block(rng.choice(("## ", "")) + rng.choice(_HEADINGS["filler"]))
        yield Block(filler.paragraph(rng))


def _title(rng: Random) -> str:
    what = rng.choice(
        ("Handbook", "Register", "Staff guide", "House book", "Field manual", "Directory")
    )
    return f"{rng.choice(w.ORGANISATIONS)} {what}, {rng.choice(w.MONTHS)} {rng.randint(1995, 2029)}"


def blocks(rng: Random) -> Iterator[Block]:
    """An endless stream of blocks for one document: take as many as fit."""
    world = _World(rng)
    dry = rng.choice((0.0, 0.1, 0.2, 0.4))
    yield Block(rng.choice(("# ", "")) + _title(rng))
    if rng.random() < 0.5:
        yield Block(filler.paragraph(rng))
    while True:
        yield from _chapter(rng, world, dry)


def characters(texts: list[str]) -> list[int]:
    """The default measure of length: about four characters per token."""
    return [len(text) // 4 + 1 for text in texts]


def generate(
    seed: int | str,
    length: int,
    measure: Callable[[list[str]], list[int]] = characters,
    separator: int = 1,
) -> Document:
    """A document of at most `length` units, from one seed.

    measure    lengths of a list of texts, in the units of `length` (such as tokens)
    separator  the length of the blank line between two blocks
    """
    return cut(blocks(Random(seed)), length, measure, separator)


def cut(
    source: Iterator[Block],
    length: int,
    measure: Callable[[list[str]], list[int]] = characters,
    separator: int = 1,
) -> Document:
    """The longest document of whole blocks from `source` that fits into `length` units.

    The first block, the title, is kept whatever its length.
    """
    kept: list[Block] = []
    used = 0
    while True:
        batch = [next(source) for _ in range(16)]
        for block, size in zip(batch, measure([b.text for b in batch]), strict=True):
            if kept and used + separator + size > length:
                return Document(
                    title=kept[0].text.removeprefix("# "),
                    text="\n\n".join(b.text for b in kept),
                    facts=tuple(f for b in kept for f in b.facts),
                )
            used += size + (separator if kept else 0)
            kept.append(block)
