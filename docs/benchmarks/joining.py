"""What it costs to read documents one by one and join them: `python docs/benchmarks/joining.py`.

Two registers, read together or each by itself and joined; whole and compacted. The same questions
about both, against the whole of both read together. Writes joining.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from record import about

from amcli.evaluation.forcing import tokenize
from amcli.evaluation.suites.base import Question
from amcli.generator.dialogues import QUESTION_KINDS, Questioner
from amcli.generator.documents import generate
from amcli.models.cache import CompactCache
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context, shared
from amcli.pipeline.contexts.forcing import Limits, Teacher
from amcli.pipeline.contexts.joining import join
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source

HERE = Path(__file__).parent


def compacted(context: Context, options: Request) -> Context:
    """A context of its own with the compact entries in place of the full ones."""
    found = compact(context, options, errors=False)
    cache = shared(context, found.layers)
    return Context(
        context.loaded, cache, context.ids, context.document_start, context.document_end,
        context.boundary, context.source,
    )  # fmt: skip


def pair(loaded: LoadedModel, seed: int, tokens: int, count: int) -> tuple[list[str], list[Any]]:
    """Two documents, and questions: `(0 or 1, question)`."""

    def measure(texts: list[str]) -> list[int]:
        return [len(loaded.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]

    texts, questions = [], []
    for number in (0, 1):
        document = generate(f"joining/{seed}/{number}", tokens, measure, 1)
        questioner, rng = Questioner(document), Random(f"{seed}/{number}")
        texts.append(document.text)
        questions += [
            (number, Question(fact.question, fact.answer, kind))
            for kind in QUESTION_KINDS
            for fact in questioner.distinct(rng, kind, count)
        ]
    return texts, questions


def contexts(loaded: LoadedModel, texts: list[str], ratio: float) -> dict[str, CompactCache]:
    """Every way to have both documents in a cache."""
    both = prefill(loaded, Source("both", "\n\n".join(texts)))
    alone = [prefill(loaded, Source(f"{n}", text)) for n, text in enumerate(texts)]
    options = Request(ratio=ratio)
    parts = [compacted(context, options) for context in alone]
    return {
        "whole, together": shared(both),
        "whole, joined": join(alone).cache,
        f"{ratio:g}×, together": compacted(both, options).cache,
        f"{ratio:g}×, joined": join(parts).cache,
    }


def main() -> None:
    """Measures all pairs and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--ratio", type=float, default=20.0)
    args = parser.parse_args()
    loaded = load(args.model, dtype=args.dtype)
    sums: dict[str, dict[str, float]] = {}
    for seed in range(args.pairs):
        texts, asked = pair(loaded, seed, args.tokens, args.questions)
        made = contexts(loaded, texts, args.ratio)
        forced = [tokenize(loaded, question) for _, question in asked]
        teacher = Teacher(loaded, forced, made["whole, together"], Limits.of(loaded.device))
        for name, cache in made.items():
            row = sums.setdefault(name, {"first": 0, "second": 0, "kl": 0.0, "tokens": 0, "n": 0})
            for (number, _), outcome in zip(asked, teacher.measure(cache), strict=True):
                row["second" if number else "first"] += outcome.exact
                row["kl"] += outcome.kl
                row["tokens"] += outcome.tokens
                row["n"] += 0.5
    rows = [
        {
            "context": name,
            "recall_first": round(row["first"] / row["n"], 4),
            "recall_second": round(row["second"] / row["n"], 4),
            "kl": round(row["kl"] / row["tokens"], 5),
        }
        for name, row in sums.items()
    ]
    for found in rows:
        print(json.dumps(found, ensure_ascii=False))
    result = {
        **about(args, loaded),
        "rows": rows,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (HERE / "joining.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
