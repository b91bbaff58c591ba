"""Writes quality.md from results of `amkv eval`: `python docs/benchmarks/quality.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

SECTIONS = {
    "quality-2k": "Dense registers, 2k tokens",
    "quality-8k": "A dense register, 8k tokens",
    "quality-sparse": "A sparse register, 2.8k tokens",
    "quality-cpu": "Eight dense registers, 2k tokens, on a CPU",
    "quality-olmo2": "Another model, 2k tokens",
    "quality-llama": "A deeper model, 2k tokens",
}

ABOUT = {
    "quality-cpu": (
        "The ratios are relative to float32: halve them for bf16. On two cores, two documents at\n"
        "a time (`--jobs 2`), all of it took 9 minutes and 16 seconds."
    ),
    "quality-llama": (
        "`llama` of [other models of this kind](../pocket.md): 12 layers, 48 KV heads. It answers\n"
        "direct questions and hardly any of the others, so only `direct` says anything here. It\n"
        "ran in float32 on a CPU: halve the ratios for bf16."
    ),
    "quality-sparse": "The same kinds of fact with filler between them: one in about 40 tokens.",
    "quality-olmo2": (
        "`olmo2` of [other models of this kind](../pocket.md): another architecture with 42 KV\n"
        "heads. With the whole document it answers most questions, but not all. The project's\n"
        "script trains it; it is not published, and `--model` takes its folder. Defaults were\n"
        "chosen on other seeds of this model and of pocket."
    ),
}

FORMER = {"omp": "omp-no-bias", "omp-beta": "omp"}
"""Names of methods in results from before biases were part of `omp`, and today's."""

INTRO = """\
# Quality at equal stored bytes

These tables give the recall of small models trained for the task, mostly [pocket](../pocket.md), on
generated registers. The seeds are ones that training never saw, and each document is compacted by
each method. Recall is exact match of the whole greedy answer; every context is asked the same
questions: direct, reverse and two-hop, in equal numbers. The ratio is full key and value bytes in
bf16 over stored bytes, with biases and scales. *These are results about demonstration models and
documents made for them.* They show which methods lose facts; they do not say how much a method
loses on other models or texts. There are few documents, so the intervals in the JSON are wide.

**Names and defaults are those of the time.** All of this was measured before biases became part of
`omp`: the tables' `omp` is today's `omp-no-bias`, and their `omp-beta` is today's `omp`. These two
and `highest-attention` also had the model ask itself questions where there were 10 keys or more for
each entry, which in bf16 is from 50× on; today they do so only with `--queries repeat+self-study`.
The commands use today's names, and leave those questions out.
[Real models](real/real.md) are measured with today's defaults.

`omp`, `omp-beta` and `highest-attention` store 4-bit codes here, as they do by default; other
methods store numbers in the model's dtype, as their papers do. At the same bytes, codes make 3.4
times as many entries, and that is most of the distance between the methods. It says nothing about
the rivals' scores: any method can have it with `--store int4`, and [methods.md](../methods.md)
compares at equal entries.

Baselines follow their papers' defaults. Each is a small file in
[amcli/matching/baselines](../../amcli/matching/baselines) that names its source and what differs.
`am-omp` and `am-highest-attention` are the recipes of the Attention Matching paper with its
uniform budgets (the paper's own non-uniform budgets come from a search for each model, and are not
used here). `summary` is the model's own summary, which pocket cannot write: it was not trained to.
"""


def rows(result: dict[str, Any], kind: str) -> dict[tuple[str, float | None], dict[str, Any]]:
    """Rows of one kind of question by method and ratio."""
    return {(r["method"], r["ratio"]): r for r in result["rows"] if r["kind"] == kind}


def table(result: dict[str, Any], kind: str, measure: str, digits: int) -> list[str]:
    """One measure of every method at every ratio."""
    found = rows(result, kind)
    ratios = sorted({ratio for _, ratio in found if ratio is not None})
    lines = ["| method | " + " | ".join(f"{r:g}×" for r in ratios) + " |"]
    lines.append("|" + " --- |" * (len(ratios) + 1))
    for method in dict.fromkeys(m for m, ratio in found if ratio is not None):
        values = [found[method, r][measure]["value"] for r in ratios]
        lines.append(f"| `{method}` | " + " | ".join(f"{v:.{digits}f}" for v in values) + " |")
    return lines


def anchors(result: dict[str, Any]) -> str:
    """What the two anchor rows gave."""
    found = rows(result, "all")
    full, none = found["full", None], found["none", None]
    return (
        f"Full context: recall {full['recall']['value']:.3f}. No context: "
        f"{none['recall']['value']:.3f}, KL {none['kl']['value']:.2f}."
    )


def command(name: str, result: dict[str, Any]) -> list[str]:
    """What measures it again, with today's names of the methods."""
    s = result["settings"]
    ratios = ",".join(f"{r:g}" for r in s["methods"][0][1])
    names = [method for method, _ in s["methods"]]
    today = FORMER if "omp-beta" in names else {}
    methods = ",".join(today.get(method, method) for method in names)
    model = s["model"] if s["model"] == "pocket" else f"FOLDER/{s['model']}"
    return [
        "```sh",
        f"amkv eval --suite {s['suite']} --model {model} --seed {s['seed']} \\",
        f"  --dtype {s['dtype']} --tokens {s['tokens']} --docs {s['docs']} \\",
        *[f"  --{name} {s[name]} \\" for name in ("questions", "queries") if s[name] is not None],
        f"  --ratio {ratios} --method {methods} \\",
        f"  -o {name}.json --plot {name}.png",
        "```",
    ]


def section(name: str, result: dict[str, Any]) -> list[str]:
    """The tables of one set of documents."""
    asked = rows(result, "all")["full", None]["questions"]
    docs = len(result["documents"])
    tables = []
    for kind in ("all", "direct", "reverse", "two-hop"):
        title = "all questions" if kind == "all" else f"{kind} questions"
        tables += [f"Recall, {title}:", "", *table(result, kind, "recall", 3), ""]
    return [
        f"## {SECTIONS[name]}: {docs} document{'s' * (docs > 1)}, {asked} questions",
        "",
        *([ABOUT[name], ""] if name in ABOUT else []),
        f"{anchors(result)} {result['hardware']}, torch {result['tools']['torch']}, transformers "
        f"{result['tools']['transformers']}, {result['settings']['dtype']}, seed "
        f"{result['settings']['seed']}, {result['date']}; raw results with 95% bootstrap "
        f"intervals in [{name}.json]({name}.json).",
        "",
        f"![recall and KL by ratio]({name}.png)",
        "",
        *tables,
        "KL divergence to the full context, nats per answer token:",
        "",
        *table(result, "all", "kl", 4),
        "",
        *command(name, result),
        "",
    ]


def main() -> None:
    """Writes quality.md beside this file."""
    lines = [INTRO]
    for name in SECTIONS:
        lines += section(name, json.loads((HERE / f"{name}.json").read_text()))
    notes = (HERE / "quality-notes.md").read_text()
    (HERE / "quality.md").write_text("\n".join([*lines, notes]))


if __name__ == "__main__":
    main()
