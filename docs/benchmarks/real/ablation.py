"""What each piece of `omp` is worth on real models and documents: one change at a time.

    python docs/benchmarks/real/ablation.py FOLDER/qwen0.5b --file DATA/qa.jsonl -o RESULTS \
      [--suite qa] [--docs 0,3] [--ratio 10,20,40] [--only "default,repeat alone"]
    python docs/benchmarks/real/ablation.py --table RESULTS

Writes RESULTS/ablation-MODEL-FILE-DOC.json for each document: what is lost (KL of the answers, as a
share of what no context loses), per variant and ratio, at equal stored bytes. A variant that is
there already is not measured again. Run it once for each document to use several GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import about

from amcli.evaluation import makers
from amcli.evaluation.forcing import Limits, Teacher, tokenize
from amcli.evaluation.runner import measure_of
from amcli.evaluation.suites import base
from amcli.matching import bucket, budgets, methods
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts import reading
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries.passages import SOURCES, Passage, QuerySource
from amcli.pipeline.queries.passes import Passes
from amcli.pipeline.queries.self_study import Exchange, dialogues
from amcli.system.clock import stopwatch
from amcli.system.progress import Silent

Change = dict[str, Any]

VARIANTS: dict[str, Change] = {
    "default": {},
    # how entries are stored
    "k8v8": {"store": "k8v8"},
    "k4v3": {"store": "k4v3"},
    "k4v2": {"store": "k4v2"},
    "k3v3": {"store": "k3v3"},
    "k3v2": {"store": "k3v2"},
    "k2v2": {"store": "k2v2"},
    "int8": {"store": "int8"},
    "int4": {"store": "int4"},
    "native": {"store": "native"},
    # what it is asked
    "repeat alone": {"queries": "repeat"},
    "repeat alone, ranked by rms": {"queries": "repeat, rms"},
    "quotes alone": {"queries": "quotes"},
    "self-study alone": {"queries": "self-study"},
    "with self-study instead of quotes": {"queries": "repeat+self-study"},
    "with self-study": {"queries": "repeat+quotes+self-study"},
    "with the context's own": {"queries": "repeat+quotes+context"},
    "a quarter of the queries": {"max_queries": 4096},
    "oracle: the test's own questions": {"queries": "oracle"},
    # selection and fits
    "no biases": {"method": {"mass": "none"}},
    "original values": {"method": {"values": "original"}},
    "values shrunk by 1": {"method": {"values": "shrink"}},
    "no pursuit": {"method": {"selection": "top"}},
    "no pursuit, no biases, original values": {
        "method": {"selection": "top", "mass": "none", "values": "original"}
    },
    "pursuit for every head": {"constant": (bucket, "PLENTY", 0)},
    "gamma 0.5": {"method": {"gamma": 0.5}},
    "16 candidates an entry": {"method": {"candidates": 16}},
    # budgets
    "uniform budget": {"budget": "uniform"},
    "floors of 0.3 of the mean": {"constant": (budgets, "FLOOR_SHARE", 0.3)},
    "floors of 0.03 of the mean": {"constant": (budgets, "FLOOR_SHARE", 0.03)},
}
"""What differs from `--method omp --store k4v4`: fields of the request, fields of the method, or a
constant of a module."""


class Bench:
    """One document in the model, with its questions."""

    def __init__(self, loaded: LoadedModel, document: base.Document):
        self.context = reading.prefill(loaded, Source(document.name, document.text))
        self.questions = document.questions
        full = makers.whole(self.context).cache
        forced = [tokenize(loaded, question) for question in document.questions]
        self.teacher = Teacher(loaded, forced, full, Limits.of(loaded.device))
        self.teacher.measure(full)
        self.none = self.kl(makers.nothing(loaded, 0).cache)
        self.passes = Passes(self.context)
        known = [Exchange(q.text, q.answer) for q in document.questions]

        def asked(context: Context, seed: int, progress: Any) -> list[Passage]:
            whole = slice(0, context.T)
            return [Passage(ids, 0, context.T, whole) for ids, _ in dialogues(context, known, 2048)]

        SOURCES["oracle"] = QuerySource(asked, "rms")
        SOURCES["repeat, rms"] = replace(SOURCES["repeat"], statistic="rms")

    def kl(self, cache: Any) -> float:
        """KL of all answers, in nats."""
        return sum(outcome.kl for outcome in self.teacher.measure(cache))

    def row(self, title: str, change: Change, ratio: float) -> dict[str, Any]:
        """One variant at one ratio."""
        fields = {k: v for k, v in change.items() if k not in ("method", "constant")}
        request = Request(ratio=ratio, store="k4v4")
        with changed(title, change) as name:
            request = replace(request, method=name, **fields)
            began = stopwatch(self.context.loaded.device)
            made = makers.make(self.context, request, self.passes, Silent())
            spent = stopwatch(self.context.loaded.device) - began
        kl = self.kl(made.cache)
        error = made.output_error
        return {
            "variant": title,
            "ratio": ratio,
            "real_ratio": round(made.ratio or 0.0, 3),
            "kl": round(kl, 6),
            "lost": round(kl / self.none, 6),
            "output_error": None if error is None else round(error, 6),
            "seconds": round(spent, 3),
        }


@contextmanager
def changed(title: str, change: Change) -> Iterator[str]:
    """The name of the method to ask for while the change holds."""
    name = "omp"
    if "method" in change:
        name = "omp " + title
        methods.register(replace(methods.get("omp"), name=name, **change["method"]))
    module, constant, value = change.get("constant", (bucket, "PLENTY", bucket.PLENTY))
    before = getattr(module, constant)
    setattr(module, constant, value)
    try:
        yield name
    finally:
        setattr(module, constant, before)
        if name != "omp":
            methods.unregister(name)


def measure(args: argparse.Namespace) -> None:
    """Measures what is not there yet."""
    loaded = load(args.model, dtype=args.dtype, device=args.device)
    suite = base.get(args.suite)
    wanted = base.Wanted(
        0 if args.suite == "qa" else 1000, None, 0, 0, measure_of(loaded), args.file
    )
    documents = suite.documents(wanted)
    chosen = range(len(documents)) if args.docs is None else map(int, args.docs.split(","))
    titles = list(VARIANTS) if args.only is None else args.only.split(",")
    for index in chosen:
        name = f"ablation-{Path(args.model).name}-{args.file.stem}-{index}.json"
        path = args.output / name
        known = json.loads(path.read_text()) if path.exists() else None
        rows = known["rows"] if known else []
        done = {(row["variant"], row["ratio"]) for row in rows}
        ratios = [float(ratio) for ratio in args.ratio.split(",")]
        todo = [(t, r) for t in titles for r in ratios if (t, r) not in done]
        if not todo:
            continue
        bench = Bench(loaded, documents[index])
        head = about(args, loaded)
        head["settings"] |= {"file": args.file.name, "output": None, "table": None}
        result = {
            **head,
            "document": index,
            "tokens": bench.context.T,
            "questions": len(bench.questions),
            "none": round(bench.none, 6),
            "rows": rows,
        }
        for title, ratio in todo:
            try:
                rows.append(bench.row(title, VARIANTS[title], ratio))
            except torch.OutOfMemoryError:
                print(f"{name}: {title} at {ratio:g}: out of memory", flush=True)
                continue
            print(name, json.dumps(rows[-1]), flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(folder: Path) -> str:
    """Markdown: what is lost over all documents that have the default, and the factor to it."""
    kl: dict[tuple[str, str], dict[tuple[str, float], dict[int, float]]]
    kl = defaultdict(lambda: defaultdict(dict))
    none: dict[tuple[str, str, int], float] = {}
    for path in sorted(folder.glob("ablation-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        group = record["settings"]["model"], Path(record["settings"]["file"]).stem
        none[(*group, record["document"])] = record["none"]
        for row in record["rows"]:
            kl[group][row["variant"], row["ratio"]][record["document"]] = row["kl"]
    lines = []
    for group, cells in kl.items():
        ratios = sorted({ratio for _, ratio in cells})
        lines += [f"{group[0]}, `{group[1]}`:", ""]
        lines += ["| | " + " | ".join(f"{r:g}×" for r in ratios) + " |"]
        lines += ["| --- |" + " --- |" * len(ratios)]
        for title in dict.fromkeys(title for title, _ in cells):
            line = f"| {title} |"
            for ratio in ratios:
                mine, base_ = cells.get((title, ratio), {}), cells.get(("default", ratio), {})
                both = sorted(mine.keys() & base_.keys())
                if not both:
                    line += " |"
                    continue
                whole = sum(none[(*group, d)] for d in both)
                lost = sum(mine[d] for d in both) / whole
                factor = sum(mine[d] for d in both) / max(1e-12, sum(base_[d] for d in both))
                line += f" {lost:.1%}" + (f", {factor:.2f}" if title != "default" else "")
                line += f" ({len(both)}) |"
            lines.append(line)
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measures, or prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--suite", choices=("qa", "quality"), default="qa")
    parser.add_argument("--docs", help="numbers of documents, from 0; all if left out")
    parser.add_argument("--ratio", default="10,20,40")
    parser.add_argument("--only", help="variants, separated by commas")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--table", type=Path, help="print the table of a folder of results")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if args.table is not None:
        print(table(args.table))
    elif args.model is None or args.file is None:
        parser.error("a model and --file are needed")
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            measure(args)


if __name__ == "__main__":
    main()
