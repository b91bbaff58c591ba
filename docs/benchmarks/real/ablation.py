"""What each piece of `omp` is worth on real models and documents: one change at a time.

    python docs/benchmarks/real/ablation.py FOLDER/qwen0.5b --file DATA/qa.jsonl -o RESULTS \
      [--suite qa] [--docs 0,3] [--ratio 10,20,40] [--only "default,repeat alone"]
    python docs/benchmarks/real/ablation.py --table RESULTS
    python docs/benchmarks/real/ablation.py --foretold RESULTS

Writes RESULTS/ablation-MODEL-FILE-DOC.json for each document: what is lost (KL of the answers, as a
share of what no context loses), per variant and ratio, at equal stored bytes; and what is lost of
text that can be made without questions, which may foretell it (`--foretold`: how well). A variant
that is there already is not measured again. Run it once for each document to use several GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import about

from amcli.evaluation import makers
from amcli.evaluation.forcing import tokenize
from amcli.evaluation.runner import measure_of
from amcli.evaluation.suites import base
from amcli.matching import bucket, budgets, methods
from amcli.models.loading import LoadedModel, load
from amcli.models.spoken import quoted
from amcli.pipeline.compaction import budget_file, heldout
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request, budget_named
from amcli.pipeline.contexts import reading
from amcli.pipeline.contexts.context import Context, full_layers
from amcli.pipeline.contexts.forcing import Limits, Teacher
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries import prompts, quotes
from amcli.pipeline.queries.passages import SOURCES, Passage, quote_passages
from amcli.pipeline.queries.passes import Passes
from amcli.pipeline.queries.self_study import Exchange, dialogues, study
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
    "repeat alone by max": {"queries": "repeat", "method": {"score_kind": "max"}},
    "by max": {"method": {"score_kind": "max"}},
    "half as many quotes": {"queries": "repeat+half the quotes"},
    "a quarter as many quotes": {"queries": "repeat+a quarter of the quotes"},
    "quotes alone": {"queries": "quotes"},
    "self-study alone": {"queries": "self-study"},
    "with self-study instead of quotes": {"queries": "repeat+self-study"},
    "64 questions instead of quotes": {"queries": "repeat+64 questions"},
    "with self-study": {"queries": "repeat+quotes+self-study"},
    "with 64 questions": {"queries": "repeat+quotes+64 questions"},
    "with the context's own": {"queries": "repeat+quotes+context"},
    "half of the queries": {"max_queries": 8192},
    "a quarter of the queries": {"max_queries": 4096},
    "oracle: the test's own questions": {"queries": "oracle"},
    # selection and fits
    "no biases": {"method": {"mass": "none"}},
    "original values": {"method": {"values": "original"}},
    "values shrunk by 1": {"method": {"values": "shrink"}},
    "no pursuit": {"method": {"selection": "top"}},
    "neither pursuit nor biases nor fitted values": {
        "method": {"selection": "top", "mass": "none", "values": "original"}
    },
    "pursuit for every head": {"constant": (bucket, "PLENTY", 0)},
    "exact pursuit": {"method": {"panel": 1, "candidates": 1 << 20}},
    "gamma 0.5": {"method": {"gamma": 0.5}},
    "16 candidates an entry": {"method": {"candidates": 16}},
    # budgets
    "uniform budget": {"budget": "uniform"},
    "floors of 0.3 of the mean": {"constant": (budgets, "FLOOR_SHARE", 0.3)},
    "floors of 0.03 of the mean": {"constant": (budgets, "FLOOR_SHARE", 0.03)},
    "budget of another document": {"budget": 1},
    "mean budget of three others": {"budget": 3},
    "budget of the oracle": {"budget": "oracle"},
    # other methods
    "highest-attention": {"name": "highest-attention"},
    "kvzip": {"name": "kvzip"},
    "expected-attention": {"name": "expected-attention"},
    "snapkv": {"name": "snapkv"},
}
"""What differs from `--method omp --store k4v4`: fields of the request, fields of the method, a
constant of a module, another method by name, the mean budget of the N documents that follow, or
that of a compaction for the questions of the test."""

TEXTS = {"parts": 4, "quotes": 32, "questions": 24}
"""Text that may foretell what is lost: parts of the document repeated, as `--fidelity` does it, and
quotes and the model's own questions by another seed. How many of each at most."""


class Bench:
    """One document in the model, with its questions."""

    def __init__(self, loaded: LoadedModel, documents: Sequence[base.Document], index: int):
        self.documents, self.index = documents, index
        document = documents[index]
        self.context = reading.prefill(loaded, Source(document.name, document.text))
        self.questions = document.questions
        self.teachers = {"": self.teacher(document.questions)}
        for name, questions in foretelling(self.context).items():
            self.teachers[name] = self.teacher(questions)
        nothing = makers.nothing(loaded, 0).cache
        self.none = {name: self.kl(name, nothing) for name in self.teachers}
        self.passes = Passes(self.context)
        self.shared: dict[int, dict[int, list[int]]] = {}
        known = [Exchange(q.text, q.answer) for q in document.questions]

        def asked(exchanges: Sequence[Exchange], context: Context) -> list[Passage]:
            whole = slice(0, context.T)
            found = dialogues(context, exchanges, 2048)
            return [Passage(ids, 0, context.T, whole, asked=n) for ids, n in found]

        SOURCES["oracle"] = lambda context, *_: asked(known, context)

        def some(context: Context, seed: int, _: Any) -> list[Passage]:
            return asked(study(context, 64, seed=seed), context)

        def quoting(share: float, context: Context, seed: int, _: Any) -> list[Passage]:
            return quote_passages(context, seed, share)

        SOURCES["half the quotes"] = partial(quoting, 1 / 2)
        SOURCES["a quarter of the quotes"] = partial(quoting, 1 / 4)
        SOURCES["64 questions"] = some

    def teacher(self, questions: Sequence[base.Question]) -> Teacher:
        """Measures against the whole document, which it has measured."""
        loaded = self.context.loaded
        forced = [tokenize(loaded, question) for question in questions]
        full = makers.whole(self.context).cache
        found = Teacher(loaded, forced, full, Limits.of(loaded.device))
        found.measure(full)
        return found

    def kl(self, name: str, cache: Any) -> float:
        """KL of all answers, in nats."""
        return sum(outcome.kl for outcome in self.teachers[name].measure(cache))

    def lengths(self, index: int) -> dict[int, list[int]]:
        """How the defaults share entries out at 20x for another document."""
        if index not in self.shared:
            document, loaded = self.documents[index], self.context.loaded
            other = reading.prefill(loaded, Source(document.name, document.text))
            found = compact(other, Request(ratio=20, store="k4v4"), progress=Silent())
            self.shared[index] = {i: list(found.layers[i].lengths) for i in full_layers(other)}
        return self.shared[index]

    def budget(self, count: int) -> Any:
        """The mean budget of the `count` documents that follow."""
        after = [(self.index + k + 1) % len(self.documents) for k in range(count)]
        share: dict[int, list[int]] = {}
        for lengths in map(self.lengths, after):
            total = sum(map(sum, lengths.values()))
            for i, heads in lengths.items():
                mine = [round(10**6 * t / total) for t in heads]
                share[i] = [a + b for a, b in zip(share.get(i, [0] * len(mine)), mine, strict=True)]
        return shared_as(share)

    def row(self, title: str, change: Change, ratio: float) -> dict[str, Any]:
        """One variant at one ratio."""
        fields = {k: v for k, v in change.items() if k not in ("method", "constant", "name")}
        if change.get("budget") == "oracle":
            asked = Request(ratio=ratio, store="k4v4", queries="oracle")
            found = compact(self.context, asked, passes=self.passes, progress=Silent())
            lengths = {i: list(found.layers[i].lengths) for i in full_layers(self.context)}
            fields["budget"] = shared_as(lengths)
        elif isinstance(change.get("budget"), int):
            fields["budget"] = self.budget(change["budget"])
        request = Request(ratio=ratio, store="k4v4")
        with changed(title, change) as name:
            request = replace(request, method=name, **fields)
            began = stopwatch(self.context.loaded.device)
            made = makers.make(self.context, request, self.passes, Silent())
            spent = stopwatch(self.context.loaded.device) - began
        kl = {name: self.kl(name, made.cache) for name in self.teachers}
        lost = {name: round(kl[name] / self.none[name], 6) for name in kl}
        error = made.output_error
        return {
            "variant": title,
            "ratio": ratio,
            "real_ratio": round(made.ratio or 0.0, 3),
            "kl": round(kl[""], 6),
            "lost": lost.pop(""),
            "foretold": lost,
            "output_error": None if error is None else round(error, 6),
            "seconds": round(spent, 3),
        }


def shared_as(lengths: dict[int, list[int]]) -> Any:
    """A budget that shares entries out like these."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "budget.json"
        budget_file.write(path, lengths, {}, overwrite=True)
        return budget_named(str(path))


def foretelling(context: Context) -> dict[str, list[base.Question]]:
    """Questions and answers for each of `TEXTS`, made of the document by a seed of their own."""
    seed, tokenizer = 7919, context.loaded.tokenizer
    repeated = []
    for part in heldout.parts(context, 128, TEXTS["parts"], seed):
        head = quoted(tokenizer, part.ids[part.first - heldout.QUOTED : part.first])
        said = quoted(tokenizer, part.ids[part.first - heldout.QUOTED :])
        repeated.append(base.Question(prompts.REPEAT_FROM.format(start=head), said, "part"))

    def asked(exchanges: Sequence[Exchange]) -> list[base.Question]:
        return [base.Question(x.question, x.answer, "asked") for x in exchanges]

    return {
        "parts": repeated,
        "quotes": asked(quotes.exchanges(context, seed)[: TEXTS["quotes"]]),
        "questions": asked(study(context, TEXTS["questions"], seed=seed)),
    }


@contextmanager
def changed(title: str, change: Change) -> Iterator[str]:
    """The name of the method to ask for while the change holds."""
    name = change.get("name", "omp")
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
        if "method" in change:
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
        bench = Bench(loaded, documents, index)
        head = about(args, loaded)
        unsaid = {"output": None, "table": None, "foretold": None}
        head["settings"] |= {"file": args.file.name, **unsaid}
        result = {
            **head,
            "document": index,
            "tokens": bench.context.T,
            "questions": len(bench.questions),
            "none": round(bench.none[""], 6),
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


def correlations(folder: Path) -> str:
    """Markdown: Spearman's rank correlation of what is lost with each text that may foretell it,
    over documents, variants and ratios. Not of the oracle, which serves the test alone."""
    pairs: dict[tuple[str, str], dict[str, list[tuple[float, float]]]]
    pairs = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("ablation-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        group = record["settings"]["model"], Path(record["settings"]["file"]).stem
        for row in record["rows"]:
            if "oracle" in row["variant"]:
                continue
            known = {**row.get("foretold", {}), "output error": row["output_error"]}
            for name, value in known.items():
                if value is not None:
                    pairs[group][name].append((value, row["lost"]))
    names = list(dict.fromkeys(name for found in pairs.values() for name in found))
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for group, found in pairs.items():
        cells = [f"{spearman(found[name]):.3f} ({len(found[name])})" for name in names]
        lines.append(f"| {group[0]}, `{group[1]}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """The correlation of ranks; equal values share the mean of theirs."""
    both = torch.tensor(pairs, dtype=torch.float64)  # [n, 2]
    below = (both.unsqueeze(0) < both.unsqueeze(1)).double().sum(1)
    upto = (both.unsqueeze(0) <= both.unsqueeze(1)).double().sum(1)
    return float(torch.corrcoef(((below + upto) / 2).T)[0, 1])


def main() -> None:
    """Measures, or prints a table."""
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
    parser.add_argument("--foretold", type=Path, help="print rank correlations of such a folder")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if args.table is not None:
        print(table(args.table))
    elif args.foretold is not None:
        print(correlations(args.foretold))
    elif args.model is None or args.file is None:
        parser.error("a model and --file are needed")
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            measure(args)


if __name__ == "__main__":
    main()
