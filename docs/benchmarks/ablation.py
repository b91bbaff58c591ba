"""What each piece of the method is worth: `python docs/benchmarks/ablation.py`.

Takes `omp-no-bias` apart, which was the default when the tables of methods.md were made, one piece
at a time, on registers of seeds that are in no table of quality.md, and writes recall and KL at
equal stored bytes to ablation-NAME.json. Its variant `biases (nnls)` is today's `omp`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import about

from amcli.evaluation import makers
from amcli.evaluation.forcing import Limits, Teacher, tokenize
from amcli.evaluation.suites import base
from amcli.matching import bucket, budgets, methods
from amcli.matching.scores import SCORE_KINDS
from amcli.matching.selection import PURSUIT, OmpSettings, omp
from amcli.models.generate import absorb
from amcli.models.loading import load
from amcli.pipeline.compaction import compacting as compaction
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts import reading
from amcli.pipeline.contexts.context import Context, full_layers, live_keys
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries import reference
from amcli.pipeline.queries.passages import SOURCES, Passage, QuerySource, repeat_passages, sources
from amcli.pipeline.queries.passes import Passes
from amcli.pipeline.queries.self_study import Exchange, dialogues
from amcli.system.progress import Silent

HERE = Path(__file__).parent

BASE = "omp-no-bias"
"""The method that is taken apart. Its variant is called `default` in all results."""

PIECES: dict[str, dict[str, Any]] = {
    "default": {},
    "biases (nnls)": {"mass": "nnls"},
    "original values": {"values": "original"},
    "values shrunk by 1": {"values": "shrink"},
    "plain least-squares values": {"values": "least-squares"},
    "pursuit on mass alone": {"target": "mass"},
    "exact pursuit": {"panel": 1, "candidates": 1 << 20},
    "panels of 16": {"panel": 16},
    "panels of 32": {"panel": 32},
    "panels of 64": {"panel": 64},
    "no pursuit": {"selection": "top"},
    "no pursuit, original values": {"selection": "top", "values": "original"},
    "rms scores": {"score_kind": "rms"},
    "uniform budget": {"budget": "uniform"},
}
"""Fields of the method that differ."""

CONSTANTS: dict[str, tuple[Any, str, Any]] = {
    "pursuit for every head": (bucket, "PLENTY", 0),
    "first layer's floor 4": (budgets, "FLOOR_FIRST", 4),
    "floors of 0.3 of the mean": (budgets, "FLOOR_SHARE", 0.3),
}
"""Module, constant and value that differ from the method's."""

BOTH = "repeat+self-study"

OPTIONS: dict[str, dict[str, str]] = {
    "entries in int8": {"store": "int8"},
    "entries native": {"store": "native"},
    "self-study": {"queries": "self-study"},
    "self-study by max": {"queries": "self-study, max"},
    "repeat+self-study": {"queries": BOTH},
    "repeat+self-study by max": {"queries": "repeat+self-study, max"},
    "repeat+self-study in one pass": {"queries": "one pass"},
    "repeat+self-study fitted to repeat": {"queries": "self-study+repeat"},
    "repeat+self-study on-policy": {"queries": BOTH},
    "budget by marginal gain": {"queries": BOTH},
    "repeat in short parts": {"queries": "short parts"},
    "repeat in short parts that score their own keys": {"queries": "own parts"},
    "oracle": {"queries": "oracle"},
}
"""Request that differ. The oracle's reference queries are the test's own questions and answers."""


def register() -> dict[str, str]:
    """Registers each variant; variant to method name."""
    names = {}
    for title, fields in PIECES.items():
        names[title] = title.replace(" ", "-") if fields else BASE
        if fields:
            methods.register(replace(methods.get(BASE), name=names[title], **fields))
    return names


def documents(args: argparse.Namespace, loaded: Any) -> list[base.Document]:
    """Registers of the suite asked for."""

    def count(texts: Any) -> list[int]:
        return [len(loaded.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]

    request = base.Wanted(args.docs, args.questions, args.tokens, args.seed, base.Measure(count))
    return base.get(args.suite).documents(request)


class Bench:
    """One document in the model, with its questions."""

    def __init__(self, loaded: Any, document: base.Document):
        self.context = reading.prefill(loaded, Source(document.name, document.text))
        self.questions = document.questions
        full = makers.whole(self.context).cache
        forced = [tokenize(loaded, question) for question in document.questions]
        self.teacher = Teacher(loaded, forced, full, Limits.of(loaded.device))
        self.full = self.teacher.measure(full)
        self.passes = Passes(self.context)

    def measure(self, options: Request, on_policy: bool = False) -> tuple[list[Any], float]:
        """Outcomes of all questions, and the real ratio."""
        made = makers.make(self.context, options, self.passes, Silent())
        if on_policy:
            made = self._again(made, options)
        return self.teacher.measure(made.cache), made.full_bytes / made.stored_bytes

    def gains(self, options: Request) -> list[torch.Tensor]:
        """Per layer `[H, T]`: what each further entry of pursuit takes off a head's squared error,
        weighted by the head's share of attention on the document."""
        method = methods.get(options.method)
        found, _ = compaction.references(
            self.context, method, options.query_plan(method), None, self.passes, Silent()
        )
        gains = []
        for layer in full_layers(self.context):
            r, (K, V) = found[layer], live_keys(self.context, layer)
            H, T, _ = K.shape
            curve = omp(
                r.sample.queries(K, V), r.sample.logits, K, r.ranked(), [min(T, PURSUIT)] * H,
                OmpSettings(seed=options.seed),
            ).residual  # fmt: skip
            drop = -torch.diff(curve, dim=1, prepend=torch.ones(H, 1))
            share = r.sample.weights.mean(1, keepdim=True)
            gains.append(torch.nn.functional.pad(drop * share, (0, T - drop.shape[1])))
        return gains

    def _again(self, made: makers.Made, options: Request) -> makers.Made:
        """The same compaction once more, with queries as they are over its compact context.

        Layer by layer in one forward pass gives the same queries, but for what the second fit
        changes below; see `OnPolicy`.
        """
        parts = []
        for name in sources(str(options.queries)):
            source = SOURCES[name]
            passages = source.passages(self.context, options.seed, Silent())
            recorder = OnPolicy(
                self.context, passages, options.max_queries, options.seed, SCORE_KINDS, None, None
            )
            for passage in passages:
                recorder.open(passage)
                cache = made.cache.fork()
                with cache.observe(recorder.observe):
                    absorb(self.context.loaded.model, cache, passage.ids)
            parts.append(
                {
                    layer: replace(found, statistic=source.statistic)
                    for layer, found in recorder.finish().items()
                }
            )
        found = reference.mixed(parts)
        before = compaction.references
        compaction.references = lambda *args: (found, {"reference": 0.0})
        try:
            return makers.make(self.context, options, self.passes, Silent())
        finally:
            compaction.references = before


class OnPolicy(reference._Recorder):
    """Queries of a pass over a compact context, scored against the document's own keys."""

    def observe(self, index: int, query: Any, layer: Any, *more: Any) -> None:
        """As a layer that still has the document would be seen."""
        document = reference.live_keys(self.context, index)[0]
        keys = torch.cat([document.unsqueeze(0), layer.live()[0]], dim=2)
        after = super().observe(index, query, Whole(keys), *more)
        if after is not None:  # the mass that is known is that on the compact context
            after(None)


class Whole:
    """Stands for a layer that holds everything live."""

    def __init__(self, keys: torch.Tensor):
        self.keys = keys

    def live(self) -> tuple[torch.Tensor, None]:
        """The keys; values are not looked at."""
        return self.keys, None


SHORT = 128
"""Tokens of a short part: the registers are shorter than what `repeat-parts` takes."""


def compare_sources() -> None:
    """Other ways to rank and to mix the two sources of the mixture."""
    repeat, study = SOURCES["repeat"], SOURCES["self-study"]
    SOURCES["self-study, max"] = replace(study, statistic="max")
    SOURCES["short parts"] = QuerySource(lambda c, *_: repeat_passages(c, SHORT))
    SOURCES["own parts"] = QuerySource(
        lambda c, *_: [replace(p, own=True) for p in repeat_passages(c, SHORT)]
    )
    SOURCES["one pass"] = QuerySource(
        lambda *args: repeat.passages(*args) + study.passages(*args)
    )  # fmt: skip


def reveal(benches: list[Bench]) -> None:
    """Makes the test's questions a source of reference queries: an upper bound, not a method."""

    def passages(context: Context, seed: int, progress: Any) -> list[Passage]:
        bench = next(b for b in benches if b.context is context)
        known = [Exchange(q.text, q.answer) for q in bench.questions]
        whole = slice(0, context.T)
        return [Passage(ids, 0, context.T, whole) for ids, _ in dialogues(context, known, 2048)]

    SOURCES["oracle"] = QuerySource(passages, "rms")


def row(title: str, benches: list[Bench], options: Request) -> dict[str, Any]:
    """One variant over all documents; recall is relative to the full context's."""
    right: dict[str, int] = {}
    known: dict[str, int] = {}
    kl, tokens, ratios = 0.0, 0, []
    for bench in benches:
        before = budgets.allocate
        if "marginal gain" in title:
            gains = bench.gains(options)
            budgets.allocate = lambda name, total, *_, g=gains: budgets.adaptive(g, total)
        outcomes, ratio = bench.measure(options, on_policy="on-policy" in title)
        budgets.allocate = before
        ratios.append(ratio)
        for question, outcome, full in zip(bench.questions, outcomes, bench.full, strict=True):
            right[question.kind] = right.get(question.kind, 0) + (outcome.exact and full.exact)
            known[question.kind] = known.get(question.kind, 0) + full.exact
            kl, tokens = kl + outcome.kl, tokens + outcome.tokens
    found = {
        "variant": title,
        "ratio": options.ratio,
        "real_ratio": round(sum(ratios) / len(ratios), 3),
        "recall": {k: round(right[k] / max(1, known[k]), 4) for k in right},
        "all": round(sum(right.values()) / sum(known.values()), 4),
        "kl": round(kl / tokens, 5),
        "questions": sum(known.values()),
    }
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Measures all variants and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="the result is ablation-NAME.json")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--suite", default="register")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--docs", type=int, default=3)
    parser.add_argument("--questions", type=int, default=15)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ratio", default="80,160")
    parser.add_argument("--only", help="variants, separated by commas")
    args = parser.parse_args()
    loaded = load(args.model, dtype=args.dtype)
    names = register()
    benches = [Bench(loaded, document) for document in documents(args, loaded)]
    reveal(benches)
    compare_sources()
    rows = []
    wanted = None if args.only is None else set(args.only.split(","))
    for ratio in (float(r) for r in args.ratio.split(",")):
        plain = Request(ratio=ratio, method=BASE, store="int4", queries="repeat")
        todo: dict[str, Request] = {t: replace(plain, method=n) for t, n in names.items()}
        todo |= {title: replace(plain, **fields) for title, fields in OPTIONS.items()}
        todo |= dict.fromkeys(CONSTANTS, plain)
        todo |= {"kvzip in int4": replace(plain, method="kvzip", queries=None)}
        for title, options in todo.items():
            if wanted is not None and title not in wanted:
                continue
            module, constant, value = CONSTANTS.get(title, (bucket, "PLENTY", bucket.PLENTY))
            before = getattr(module, constant)
            setattr(module, constant, value)
            rows.append(row(title, benches, options))
            setattr(module, constant, before)
    result = {
        **about(args, loaded),
        "tokens": [bench.context.T for bench in benches],
        "seconds": round(time.process_time(), 1),
        "rows": rows,
    }
    (HERE / f"ablation-{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
