"""A long dialogue whose early facts are asked for at its end: `python docs/benchmarks/dialogue.py`.

A register is compacted, and a conversation about it begins. In each round the user tells more facts
(a small register that the document does not have) and asks about all that was told so far; then the
conversation is compacted into the context. After three compactions every fact is asked for once
more: of the document, and of each round. Against the same dialogue that is never compacted, and
one whose early rounds were forgotten. Writes dialogue.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

from record import about

from amcli.generator.dialogues import QUESTION_KINDS, Question, Questioner
from amcli.generator.documents import Document, generate
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.talk.growing import grow
from amcli.pipeline.talk.session import Session
from amcli.system.progress import Silent

HERE = Path(__file__).parent
ROUNDS = 3


def texts(loaded: LoadedModel, seed: int, tokens: int, told: int) -> list[Document]:
    """The document, and what is told in each round."""

    def measure(texts: list[str]) -> list[int]:
        return [len(loaded.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]

    sizes = [tokens] + [told] * ROUNDS
    return [generate(f"dialogue/{seed}/{i}", n, measure, 1) for i, n in enumerate(sizes)]


def asked(documents: list[Document], seed: int, count: int) -> list[list[Question]]:
    """Questions about each text with one right answer, whichever of the texts one looks at."""
    everything = Document(
        "", "\n\n".join(d.text for d in documents), sum((d.facts for d in documents), ())
    )
    right = Questioner(everything)
    found = []
    for i, document in enumerate(documents):
        own, rng = Questioner(document), Random(f"{seed}/{i}")
        mine = {(f.subject, f.attribute.name, f.value) for f in document.facts}
        own.facts = [f for f in right.facts if (f.subject, f.attribute.name, f.value) in mine]
        own.reversible = [
            f for f in right.reversible if (f.subject, f.attribute.name, f.value) in mine
        ]
        found.append([q for kind in QUESTION_KINDS[:2] for q in own.distinct(rng, kind, count)])
    return found


def dialogue(
    session: Session, documents: list[Document], questions: list[list[Question]], way: str
) -> dict[str, Any]:
    """One dialogue: what is right at its end, and what it takes."""
    seconds = 0.0
    for number, document in enumerate(documents[1:], 1):
        "".join(session.ask(document.text))
        for past in questions[: number + 1]:
            "".join(session.ask(past[0].question))
        if way == "forgotten":
            session.reset()
        elif way != "whole":
            ratio, queries = way.split("× ")
            began = time.perf_counter()
            grow(session, float(ratio), queries, progress=Silent())
            seconds += time.perf_counter() - began
    held = session.cache.nbytes() - session.origin.cache.nbytes()
    right = []
    for part in questions:
        said = []
        for question in part:
            said.append("".join(session.ask(question.question)).strip())
            session.undo()
        right.append(sum(a == q.answer for a, q in zip(said, part, strict=True)))
    return {"right": right, "bytes": held, "tokens": session.length, "seconds": seconds}


def main() -> None:
    """Runs all dialogues in all ways and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dialogues", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--told", type=int, default=400)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument("--ways", default="20× repeat,50× repeat,100× repeat,20× context")
    parser.add_argument("--output", type=Path, default=HERE / "dialogue.json")
    args = parser.parse_args()
    loaded = load(args.model, dtype=args.dtype)
    ways = ["whole", "forgotten", *args.ways.split(",")]
    rows: dict[str, dict[str, Any]] = {}
    for seed in range(args.dialogues):
        documents = texts(loaded, seed, args.tokens, args.told)
        questions = asked(documents, seed, args.questions)
        context = prefill(loaded, Source("register.txt", documents[0].text))
        compact(context, Request(ratio=args.ratio), errors=False).apply()
        for way in ways:
            found = dialogue(Session(context, max_tokens=48), documents, questions, way)
            row = rows.setdefault(
                way, {"right": [0] * (ROUNDS + 1), "asked": [0] * (ROUNDS + 1)}
                | {"bytes": 0, "tokens": 0, "seconds": 0.0},
            )  # fmt: skip
            row["right"] = [a + b for a, b in zip(row["right"], found["right"], strict=True)]
            row["asked"] = [a + len(q) for a, q in zip(row["asked"], questions, strict=True)]
            for name in ("bytes", "tokens", "seconds"):
                row[name] += found[name]
            print(seed, way, found, flush=True)
    for row in rows.values():
        for name in ("bytes", "tokens", "seconds"):
            row[name] = round(row[name] / args.dialogues, 2)
    output = args.output
    args.output = output.name
    result = {**about(args, loaded), "rows": [{"way": way, **row} for way, row in rows.items()]}
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
