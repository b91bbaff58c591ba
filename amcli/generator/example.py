"""The handbook of the examples, and twenty questions about it.

Both come from the generator and one seed, so the package needs no file for them;
`python -m amcli.generator.example docs/examples` writes them out. The seed was picked by eye, for a
document that reads well and has people, services, stations and teams in prose and in lists; how
well it compacts had no say in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TypeVar

from amcli.generator.dialogues import (
    Question,
    Questioner,
    direct_about,
    reverse_about,
    two_hop_about,
)
from amcli.generator.documents import Document, generate
from amcli.generator.tokens import Sampler
from amcli.pocket import folder

SEED = "handbook/182"
TOKENS = 4096
DIRECT, REVERSE, TWO_HOP = 14, 3, 3

HANDBOOK = "handbook.txt"
QUESTIONS = "handbook.questions.jsonl"

T = TypeVar("T")


def handbook() -> Document:
    """The example document: at most `TOKENS` of pocket's tokens, the same on every machine."""
    from tokenizers import Tokenizer

    sampler = Sampler(Tokenizer.from_file(str(folder() / "tokenizer.json")))
    return generate(SEED, TOKENS, sampler.measure, len(sampler.blank))


def questions() -> list[Question]:
    """Twenty questions about the handbook: 14 direct, then 3 reverse, then 3 two-hop.

    No two questions share a subject, and no two of one kind share an attribute.
    """
    rng = Random(f"{SEED}/questions")
    about = Questioner(handbook())
    subjects: set[Hashable] = set()
    direct = _varied(
        rng, about.facts, DIRECT, lambda fact: ({fact.subject}, fact.attribute.name), subjects
    )
    reverse = _varied(
        rng, about.reversible, REVERSE, lambda fact: ({fact.subject}, fact.attribute.name), subjects
    )
    two_hop = _varied(
        rng,
        about.hops,
        TWO_HOP,
        lambda hop: ({hop[0].subject, hop[2].subject}, hop[2].attribute.name),
        subjects,
    )
    return [
        *(direct_about(fact, rng) for fact in direct),
        *(reverse_about(fact, rng) for fact in reverse),
        *(two_hop_about(hop, rng) for hop in two_hop),
    ]


def _varied(
    rng: Random,
    pool: Sequence[T],
    count: int,
    key: Callable[[T], tuple[set[str], str]],
    subjects: set[Hashable],
) -> list[T]:
    """`count` items of the pool, drawn so that no subject or attribute (`key`) is repeated.

    Subjects in `subjects` count as used; those drawn are added to it.
    """
    drawn: list[T] = []
    attributes: set[str] = set()
    for item in rng.sample(pool, len(pool)):
        about, attribute = key(item)
        if len(drawn) < count and subjects.isdisjoint(about) and attribute not in attributes:
            subjects |= about
            attributes.add(attribute)
            drawn.append(item)
    return drawn


def write(target: Path) -> None:
    """Writes the handbook and its questions into a folder, replacing what is there."""
    target.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions()]
    (target / HANDBOOK).write_text(handbook().text + "\n", encoding="utf-8", newline="\n")
    (target / QUESTIONS).write_text("".join(rows), encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> None:
    """Command line: the folder to write to."""
    parser = argparse.ArgumentParser(prog="python -m amcli.generator.example", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the two files go, such as docs/examples")
    write(parser.parse_args(argv).folder)


if __name__ == "__main__":
    main()
