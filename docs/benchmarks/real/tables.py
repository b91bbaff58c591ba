"""Tables and the picture of real.md, from what `measure.py` and `kvpress_real.py` wrote.

python docs/benchmarks/real/tables.py                    writes real.md and real.png again
python docs/benchmarks/real/tables.py --take RESULTS     first takes over results from a folder
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from amcli.evaluation.results import Results
from amcli.system.files import write_json

HERE = Path(__file__).parent

MODELS = {
    "smollm2": "SmolLM2-135M-Instruct",
    "qwen0.5b": "Qwen2.5-Coder-0.5B-Instruct",
    "qwen1.5b": "Qwen2.5-Coder-1.5B-Instruct",
}
SUITES = {
    "qa": "free-form questions",
    "qa-more": "more free-form questions",
    "quality": "QuALITY, multiple choice",
    "tpo": "lectures, multiple choice",
    "perplexity": "the text that follows",
}
OWN = ("omp", "omp-no-bias", "highest-attention")
RIVALS = ("kvzip", "expected-attention", "snapkv")
PAPER, PURSUIT = "am-highest-attention", "am-omp"
FEWEST = 4
"""Documents without which a method has no line in the picture."""

RATIOS = (5.0, 10.0, 20.0, 40.0, 100.0)


# ---- results -----------------------------------------------------------------------------------


def take(folder: Path) -> None:
    """Copies results; a model is known by the name of its folder, wherever that was."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "settings" in record:
            record["settings"]["model"] = Path(record["settings"]["model"]).name
        write_json(HERE / path.name, record, overwrite=True)


def read(name: str) -> Results | None:
    """A file of results, also of a run that was stopped; None where there is none."""
    path = HERE / f"{name}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    fields = ("settings", "hardware", "tools", "documents", "questions")
    results = Results(*(record[field] for field in fields), date=record["date"])
    for cell in record["cells"]:
        results.cells[cell["document"], cell["method"], cell["ratio"]] = cell
    return results


def measured(results: Results, method: str, ratio: float) -> set[int]:
    """Documents on which a method was measured at a ratio."""
    return {d for d, m, r in results.cells if (m, r) == (method, ratio)}


def everywhere(results: Results) -> tuple[str, ...]:
    """The main methods that were measured on every document that `omp` was, at every ratio."""
    all_ = set.intersection(*(measured(results, "omp", ratio) for ratio in RATIOS))
    return tuple(
        method
        for method in OWN + RIVALS
        if all(measured(results, method, ratio) >= all_ for ratio in RATIOS)
    )


def only(results: Results, documents: Iterable[int]) -> Results:
    """The same on some of the documents."""
    kept = set(documents)
    found = Results(
        results.settings, results.hardware, results.tools, results.documents, results.questions
    )
    found.cells = {key: cell for key, cell in results.cells.items() if key[0] in kept}
    return found


def kvpress(model: str) -> dict[tuple[str, float | None], dict[str, float]]:
    """Per press and ratio the KL of each document, by the hash of its text; parts together."""
    found: dict[tuple[str, float | None], dict[str, float]] = defaultdict(dict)
    for path in sorted(HERE.glob(f"kvpress-{model}*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for row in record["rows"]:
            for key, cell in row["cells"].items():
                if "outcomes" in cell:
                    text = record["documents"][key]["text_sha256"]
                    kl = sum(outcome[2] for outcome in cell["outcomes"])
                    found[row["method"], row["ratio"]][text] = kl
    return found


# ---- tables ------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows]


def percent(value: float | None) -> str:
    """A share for people: one digit below 10%, none above."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if abs(value) < 0.0995 else f"{100 * value:.0f}%"


def interval(estimate: dict[str, float]) -> str:
    """A share with its interval."""
    low, high = percent(estimate["low"]), percent(estimate["high"])
    return f"{percent(estimate['value'])} ({low.rstrip('%')}–{high})"


def by_ratio(
    results: Results, methods: Sequence[str], cell: Callable[[dict[str, Any]], str]
) -> list[str]:
    """One line a method, one column a ratio."""
    lines = []
    for method in methods:
        rows = [results.row(method, ratio, "all") for ratio in RATIOS]
        lines.append([f"`{method}`", *("–" if row is None else cell(row) for row in rows)])
    return table(["", *(f"{ratio:g}×" for ratio in RATIOS)], lines)


def about(results: Results) -> str:
    """Documents, questions, and what the anchors gave."""
    full, none = results.row("full", None, "all"), results.row("none", None, "all")
    assert full is not None
    assert none is not None
    lengths = [d["tokens"] for d in results.documents]
    text = (
        f"{len(lengths)} documents of {min(lengths):,} to {max(lengths):,} tokens, "
        f"{none['questions']} questions; no context: KL {none['kl']['value']:.2f}"
    )
    if none["recall"] is not None:
        right, guessed = full["recall"]["value"], none["recall"]["value"]
        text += f"; right answers with the whole document {right:.3f}, without {guessed:.3f}"
    return text + "."


def lost_and(name: str, digits: int = 2) -> Callable[[dict[str, Any]], str]:
    """What is lost, and another metric."""

    def cell(row: dict[str, Any]) -> str:
        return f"{percent(row['lost']['value'])}, {row[name]['value']:.{digits}f}"

    return cell


def qa_section() -> list[str]:
    """Free-form answers: the main table of each model."""
    lines = []
    for model, title in MODELS.items():
        for suite in ("qa", "qa-more"):
            results = read(f"{model}-{suite}")
            if results is None:
                continue
            lines += [f"**{title}**, `{suite}`: {about(results)}", ""]
            lines += by_ratio(results, everywhere(results), lambda row: interval(row["lost"]))
            lines.append("")
    return lines


def answers_section() -> list[str]:
    """What the answers are like, beside what the distributions say."""
    lines = []
    for model in ("qwen1.5b", "smollm2"):
        results = read(f"{model}-qa")
        if results is None:
            continue
        found = []
        for method, ratio in (("full", None), ("none", None), *(("omp", r) for r in RATIOS),
                              *(("kvzip", r) for r in RATIOS[:3])):  # fmt: skip
            row = results.row(method, ratio, "all")
            assert row is not None
            name = f"`{method}` {ratio:g}×" if ratio else f"{method} context"
            values = [row[m]["value"] for m in ("same", "own_agreement", "f1", "contains")]
            own = percent(row["own_lost"]["value"])
            found.append([name, own, *(f"{value:.2f}" for value in values)])
        head = ["", "own answer, lost", "same", "top-1", "F1", "contains"]
        lines += [f"**{MODELS[model]}**, `qa`:", "", *table(head, found), ""]
    return lines


def others_section() -> list[str]:
    """Other methods, on the documents where each was measured, `omp` on the same ones."""
    lines = []
    for model, title in MODELS.items():
        for suite, name in SUITES.items():
            results = read(f"{model}-{suite}")
            if results is None:
                continue
            shown = everywhere(results)
            methods = dict.fromkeys(m for _, m, r in results.cells if r and m not in shown)
            found = []
            for method in methods:
                documents = measured(results, method, 10.0) & measured(results, method, 20.0)
                if not documents:
                    continue
                cells = [f"`{method}`", str(len(documents))]
                some = only(results, documents)
                for ratio in (10.0, 20.0):
                    for which in (method, "omp"):
                        row = some.row(which, ratio, "all", resamples=0)
                        cells.append("–" if row is None else percent(row["lost"]["value"]))
                found.append(cells)
            if found:
                head = ["", "documents", "10×", "`omp` there", "20×", "`omp` there"]
                lines += [f"**{title}**, {name}:", "", *table(head, found), ""]
    return lines


def paper_section() -> list[str]:
    """The paper's two recipes, `omp` and KVzip's scores on the same documents."""
    lines = []
    for model, title in MODELS.items():
        results = read(f"{model}-qa")
        if results is None:
            continue
        documents = set.intersection(*(measured(results, PURSUIT, r) for r in RATIOS))
        if len(documents) < FEWEST:
            continue
        some = only(results, documents)
        asked = sum(len(results.questions[d]) for d in documents)
        lines += [f"**{title}**, `qa`: {len(documents)} documents, {asked} questions.", ""]
        methods = ("omp", PURSUIT, PAPER, "kvzip")
        lines += [*by_ratio(some, methods, lambda row: interval(row["lost"])), ""]
    return lines + paper_on_a_cpu()


def paper_on_a_cpu() -> list[str]:
    """The same in float32, on a few documents."""
    results = read("smollm2-paper")
    assert results is not None
    done = [d for d in range(len(results.documents)) if not results.todo(d)]
    results = only(results, done)
    methods = [method for method, _ in results.settings["methods"]]
    lines = []
    for method in methods:
        rows = [results.row(method, ratio, "all") for ratio in (10.0, 20.0, 40.0)]
        lines.append([f"`{method}`", *(interval(row["lost"]) for row in rows if row)])
    asked = sum(len(results.questions[d]) for d in done)
    text = (
        f"**{MODELS['smollm2']}**, float32 on {results.hardware}; documents of `qa` with the "
        f"fewest characters: {len(done)}, questions: {asked}."
    )
    return [text, "", *table(["", "10×", "20×", "40×"], lines)]


def seconds_section() -> list[str]:
    """Seconds of compaction on a machine that does nothing else."""
    lines = []
    for model, title in MODELS.items():
        results = read(f"seconds-{model}")
        if results is None:
            continue
        found = []
        pairs = {(m, r) for _, m, r in results.cells if r}
        shared = set.intersection(*(measured(results, m, r) for m, r in pairs))
        some = only(results, shared)
        for method in dict.fromkeys(m for _, m, r in results.cells if r):
            cells = [f"`{method}`"]
            for ratio in (10.0, 40.0):
                row = some.row(method, ratio, "all", resamples=0)
                assert row is not None
                spent = row["seconds"]["reference"] + row["seconds"]["compact"]
                cells.append(f"{spent:.2f} s, {row['prefills']:.1f}")
            found.append(cells)
        lengths = [results.documents[d]["tokens"] for d in shared]
        lines += [
            f"**{title}**, one {results.hardware}: {len(lengths)} documents of {min(lengths):,} to "
            f"{max(lengths):,} tokens, means: seconds, and how many prefills that is.",
            "",
            *table(["", "10×", "40×"], found),
            "",
        ]
    return lines


def choice_section() -> list[str]:
    """Multiple choice and perplexity."""
    lines = []
    for suite in ("quality", "tpo", "perplexity"):
        for model, title in MODELS.items():
            results = read(f"{model}-{suite}")
            if results is None:
                continue
            lines += [f"**{title}**, {SUITES[suite]}: {about(results)}", ""]
            if suite == "perplexity":
                cell = lambda row: percent(row["lost"]["value"])  # noqa: E731
            else:
                cell = lost_and("recall")
            lines += [*by_ratio(results, everywhere(results), cell), ""]
    return lines


def kvpress_section() -> list[str]:
    """kvpress by its own code, and ours on the same documents."""
    lines = []
    for model, title in MODELS.items():
        theirs, results = kvpress(model), read(f"{model}-qa")
        if not theirs or results is None:
            continue
        number = {d["sha256"]: i for i, d in enumerate(results.documents)}
        none = theirs["no context", None]
        found = []
        for press in dict.fromkeys(press for press, ratio in theirs if ratio):
            cells = [press]
            for ratio in RATIOS:
                measured_on = [text for text in theirs.get((press, ratio), {}) if text in number]
                if not measured_on:
                    cells.append("–")
                    continue
                lost = sum(theirs[press, ratio][t] for t in measured_on)
                lost /= sum(none[t] for t in measured_on)
                some = only(results, [number[t] for t in measured_on])
                row = some.row("omp", ratio, "all", resamples=0)
                ours = "–" if row is None else percent(row["lost"]["value"])
                cells.append(f"{percent(lost)} / {ours} ({len(measured_on)})")
            found.append(cells)
        head = ["", *(f"{ratio:g}×" for ratio in RATIOS)]
        lines += [f"**{title}**, `qa`:", "", *table(head, found), ""]
    return lines


def receipt_section() -> list[str]:
    """What the receipt's error of the outputs says of what is lost."""
    steps = (0, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 1)
    names = [f"{m}-{s}" for m in MODELS for s in ("qa", "qa-more")]
    points: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        results = read(name)
        if results is None:
            continue
        points[name] = []
        for document, method, ratio in results.cells:
            if method in OWN and ratio:
                row = only(results, [document]).row(method, ratio, "all", resamples=0)
                if row is not None and row["output_error"] is not None:
                    points[name].append((row["output_error"], row["lost"]["value"]))
    lines = []
    for low, high in pairwise(steps):
        cells = [f"{low:g} to {high:g}"]
        for found in points.values():
            inside = sorted(lost for error, lost in found if low <= error < high)
            middle, most = (inside[len(inside) // 2], inside[-1]) if inside else (None, None)
            cells.append(f"{percent(middle)}, {percent(most)} ({len(inside)})" if inside else "–")
        lines.append(cells)
    return table(["error of the outputs", *points], lines)


# ---- picture -----------------------------------------------------------------------------------


def draw() -> None:
    """What is lost against the real ratio, one line a method."""
    figures: Any = importlib.import_module("matplotlib.figure")
    colours = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#000000")
    markers = "os^DvPX"
    suites = ("qa", "tpo", "perplexity")
    figure = figures.Figure(figsize=(11, 8.6), layout="constrained")
    axes = figure.subplots(len(suites), len(MODELS), sharex=True, sharey=True)
    for i, suite in enumerate(suites):
        for j, (model, title) in enumerate(MODELS.items()):
            panel, results = axes[i][j], read(f"{model}-{suite}")
            if results is not None:
                shown = everywhere(results)
                for k, method in enumerate((*OWN, *RIVALS, PAPER)):
                    few = len(measured(results, method, RATIOS[0])) < FEWEST
                    if few or (method in OWN and method not in shown):
                        continue
                    found = [results.row(method, ratio, "all", resamples=0) for ratio in RATIOS]
                    rows = [row for row in found if row is not None]
                    panel.plot(
                        [row["real_ratio"] for row in rows],
                        [row["lost"]["value"] for row in rows],
                        color=colours[k], marker=markers[k], markersize=5, linewidth=1.5,
                        linestyle="-" if method in OWN else "--", label=method,
                    )  # fmt: skip
            panel.axhline(1, color="0.35", linewidth=1, linestyle=(0, (1, 2)))
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_ylim(0.0015, 8)
            panel.set_xticks(RATIOS, [f"{ratio:g}×" for ratio in RATIOS])
            panel.minorticks_off()
            panel.set_yticks((0.01, 0.1, 1), ("1%", "10%", "100%"))
            panel.grid(color="0.9", linewidth=0.8)
            panel.spines[["top", "right"]].set_visible(False)
            if i == 0:
                panel.set_title(title, fontsize=10)
            if j == 0:
                panel.set_ylabel(f"{SUITES[suite]}\nlost, of what no context loses")
            if i == len(suites) - 1:
                panel.set_xlabel("full bytes ÷ stored bytes")
    found = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = [method for method in (*OWN, *RIVALS, PAPER) if method in found]
    handles = [found[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(HERE / "real.png", dpi=130)


def main() -> None:
    """Writes real.md and real.png beside this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--take", type=Path, metavar="RESULTS")
    args = parser.parse_args()
    if args.take:
        take(args.take)
    draw()
    text = (HERE / "template.txt").read_text(encoding="utf-8")
    for name, section in (
        ("QA", qa_section), ("ANSWERS", answers_section), ("CHOICE", choice_section),
        ("KVPRESS", kvpress_section), ("OTHERS", others_section), ("PAPER", paper_section),
        ("RECEIPT", receipt_section), ("SECONDS", seconds_section),
    ):  # fmt: skip
        text = text.replace(f"{{{name}}}", "\n".join(section()).strip())
    (HERE / "real.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
