"""How held-out agreement tells of answers: `python docs/benchmarks/fidelity.py [--json FILE]`.

Compacts generated registers with pocket at several ratios, and compares the agreement with the
full context that `amkv compact --fidelity` measures (parts of the document said again) with that
on the answers to the suite's questions, which nothing in a compaction knows of, and on answers to
questions that the model asks itself. Also the seconds of each stage of a search.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from amcli.evaluation.forcing import end_token
from amcli.generator.dialogues import Questioner
from amcli.generator.documents import generate
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.fidelity import Judge, held_out, search
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries.passages import Passage
from amcli.pipeline.queries.passes import Passes
from amcli.pipeline.queries.self_study import study
from amcli.system.progress import Silent
from amcli.system.versions import tools

DOCUMENTS = ((500, 21), (1000, 22), (2200, 23))  # tokens asked for, seed
METHODS = ("omp-no-bias", "highest-attention", "kvzip")
"""`omp-no-bias` was the default when fidelity.json was made, which calls it `omp`."""

RATIOS = (5, 10, 20, 35, 50, 100)


def answers(loaded: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[Passage]:
    """Questions, and the answers of which agreement is measured."""
    chat, end = loaded.chat, end_token(loaded)
    found = []
    for question, answer in pairs:
        lead = chat.first_turn(question)
        ids = lead + chat.answer_ids(answer) + ([] if end is None else [end])
        found.append(Passage(ids, len(lead), 0, slice(0)))
    return found


def judges(context: Context, questioner: Questioner, own: int) -> dict[str, Judge]:
    """What agreement is measured on."""
    loaded, rng = context.loaded, Random(0)
    texts = {"held-out parts": held_out(context, 0)}
    exchanges = study(context, own, seed=777)
    texts["own questions"] = answers(loaded, [(e.question, e.answer) for e in exchanges])
    for kind in ("direct", "reverse", "two-hop"):
        asked = questioner.distinct(rng, kind, 30)
        texts[kind] = answers(loaded, [(q.question, q.answer) for q in asked])
    return {name: Judge(context, text, Silent()) for name, text in texts.items() if text}


def rows(loaded: LoadedModel) -> Iterator[dict[str, Any]]:
    """A row for each document, method and ratio."""
    for size, seed in DOCUMENTS:
        document = generate(seed, size)
        context = prefill(loaded, Source("register", document.text))
        found = judges(context, Questioner(document), own=64)
        passes = Passes(context)
        for method in METHODS:
            for ratio in RATIOS:
                options = Request(ratio=ratio, method=method, store="native", queries="repeat")
                if method == "kvzip":
                    options = Request(ratio=ratio, method=method, store="native")
                made = compact(context, options, passes=passes, errors=False)
                agreement = {name: j.agreement(made.layers) for name, j in found.items()}
                yield {
                    "tokens": context.T,
                    "method": method,
                    "ratio": ratio,
                    "agreement": {name: round(a, 4) for name, a in agreement.items()},
                }


def searches(loaded: LoadedModel) -> Iterator[dict[str, Any]]:
    """What a search takes with the defaults, and what a plain compaction takes."""
    for size, seed in DOCUMENTS:
        context = prefill(loaded, Source("register", generate(seed, size).text))
        plain = compact(context, Request())
        yield {"tokens": context.T, "seconds": _rounded(plain.seconds), "ratio": plain.ratio}
        found = search(context, Request(), 0.99)
        reached = found.fidelity.record() if found.fidelity else None
        yield {"tokens": context.T, "seconds": _rounded(found.seconds), "fidelity": reached}


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in seconds.items()}


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load("pocket", device="cpu")
    about = {"machine": platform.machine(), "threads": 1, "tools": tools()}
    record: dict[str, Any] = {}
    for name, made in (("rows", rows(loaded)), ("searches", searches(loaded))):
        record[name] = []
        for row in made:
            record[name].append(row)
            print(json.dumps(row), flush=True)
    if args.json is not None:
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in about.items()]
        for name in ("rows", "searches"):
            text = ",\n  ".join(json.dumps(row) for row in record[name])
            lines.append(f' "{name}": [\n  {text}\n ]')
        args.json.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
