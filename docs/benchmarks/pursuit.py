"""How the pursuit may be cut short: `python docs/benchmarks/pursuit.py --models pocket FOLDER`.

Compacts one register with one thing changed at a time, and writes the error of the attention
outputs on held-out queries, the mean over all heads that a receipt shows, to pursuit.json.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from amcli.evaluation.results import today
from amcli.evaluation.runner import hardware
from amcli.generator.documents import generate
from amcli.matching import bucket, methods, selection
from amcli.matching.sample import Queries
from amcli.models.loading import load
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries.passes import Passes
from amcli.system.versions import tools

ALL = 1 << 20

BASE = "omp-no-bias"
"""The method that is changed: the default of the time when pursuit.json was made."""


def few_queries(queries: Queries, *more: Any, **options: Any) -> Any:
    """The pursuit with every second query."""
    parts = (queries.Q, queries.weights, queries.lse, queries.Y)
    return selection.omp(Queries(*(x[:, ::2] for x in parts)), *more, **options)


VARIANTS: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({}, None),
    "panels of 1": ({"panel": 1}, None),
    "panels of 32": ({"panel": 32}, None),
    "panels of 64": ({"panel": 64}, None),
    "4 candidates an entry": ({"candidates": 4}, None),
    "16 candidates an entry": ({"candidates": 16}, None),
    "all keys candidates": ({"candidates": ALL}, None),
    "candidates of the first 128 entries": ({}, partial(patch.object, selection, "SCREENED", 128)),
    "candidates of the first 512 entries": ({}, partial(patch.object, selection, "SCREENED", 512)),
    "every second query": ({}, partial(patch.object, bucket, "omp", few_queries)),
    "pursuit below 1/8 of the keys": ({}, partial(patch.object, bucket, "PLENTY", 8)),
    "no pursuit": ({"selection": "top"}, None),
}
"""Fields of the method that differ, and what else does."""


def register() -> None:
    """Makes a method of each variant, of the same name."""
    for title, (fields, _) in VARIANTS.items():
        methods.register(replace(methods.get(BASE), name=title, **fields))


def error(found: Compaction) -> float:
    """Output errors of all heads, each by its share of attention on the document."""
    if found.errors is None:
        raise ValueError("not measured")
    flat = [torch.tensor([x for heads in part for x in heads]) for part in
            (found.errors.output, found.errors.attention)]  # fmt: skip
    return round(float((flat[0] * flat[1]).sum() / flat[1].sum()), 4)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["pocket"])
    parser.add_argument("--tokens", type=int, default=3900)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--ratio", default="20,50,100")
    args = parser.parse_args()
    register()
    rows = []
    for model in args.models:
        loaded = load(model, dtype="float32")
        text = generate(args.seed, args.tokens).text
        context = prefill(loaded, Source("register", text))
        passes = Passes(context)
        for title in VARIANTS:
            other = VARIANTS[title][1]
            with nullcontext() if other is None else other():
                errors = {}
                for ratio in args.ratio.split(","):
                    options = Request(
                        ratio=float(ratio), method=title, store="int4", queries="repeat"
                    )
                    errors[ratio] = error(compact(context, options, passes=passes))
            row = {"model": Path(model).name, "tokens": context.T, "variant": title}
            rows.append(row | {"output": errors})
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "date": today(),
        "hardware": hardware(loaded.device),
        "tools": tools(),
        "seed": args.seed,
        "queries": "repeat",
        "store": "int4",
        "rows": rows,
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
