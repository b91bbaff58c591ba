"""How fast compaction is: `python docs/benchmarks/speed.py [PART ...] [--json FILE]`.

Parts, by default all but `cpu`:

fits     64 heads, 5 chunks of 12,000 keys, 50,000 queries, d = 256, 600 entries a head: selection,
         biases and values, beside a straightforward implementation of Attention Matching's own
         algorithms (arXiv 2602.16284) in the same process. Random heads: time only.
quality  held-out errors of both on the trained heads of `--models`, a register of 2,000 tokens, 100
         entries a head; and what panels and screening lose.
whole    everything after the prefill and all together, a model of Qwen3-4B's shape with random
         weights, 60,000 tokens at 50x.
growth   the same at 4k to 128k tokens, with the peak of GPU memory.
cpu      `amkv compact` of a document of 4,000 tokens by the model in the box, all stages.

Every number is a median; how many runs it is of stands beside it. Results from before 2026-11-27
have `omp-beta` for today's `omp`, and `omp` for today's `omp-no-bias`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import torch

from amcli.commands.screen.bar import Bar
from amcli.commands.screen.terminal import animated
from amcli.evaluation import bench
from amcli.evaluation.results import today
from amcli.evaluation.runner import hardware
from amcli.generator.documents import generate
from amcli.matching import methods
from amcli.matching.fit_errors import FitErrors, fit_errors
from amcli.matching.layers import compact_layers
from amcli.matching.methods import LayerInput
from amcli.matching.sample import Sample
from amcli.matching.scores import ScoreState
from amcli.matching.tiles import Logits
from amcli.models.loading import load
from amcli.models.shapes import shaped
from amcli.pipeline.compaction import heldout
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import full_layers, live_keys
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries.passages import repeat_passages
from amcli.pipeline.queries.reference import collect
from amcli.system.clock import stopwatch
from amcli.system.progress import Progress, Silent
from amcli.system.versions import tools

HEADS, CHUNKS, KEYS, QUERIES, DIM, ENTRIES = 64, 5, 12_000, 50_000, 256, 600
SAMPLE = 10_000
"""Queries that our fits use; the scores look at all of them."""

Entry = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # keys [t, d], beta [t], values [t, dv]

# ---- the paper's algorithms, as they are written ------------------------------------------------


def paper_omp(
    Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, t: int, scale: float, keys: int, every: int
) -> Entry:
    """Algorithm 1: `keys` a step, weights by least squares at every `every`th step; one head.

    `Q [n, d]`, `K [T, d]`, `V [T, dv]`; weights are clamped to at least 1e-12.
    """
    S = (Q.float() @ K.float().T) * scale  # [n, T]
    Phi = (S - S.amax(1, keepdim=True)).exp_()
    del S
    m = Phi.sum(1)
    chosen: list[int] = []
    free = torch.ones(K.shape[0], dtype=torch.bool, device=K.device)
    r = m
    w = m.new_zeros(0)
    step = 0
    while len(chosen) < t:
        product = (r @ Phi).masked_fill(~free, -torch.inf)
        picked = product.topk(min(keys, t - len(chosen))).indices
        chosen += picked.tolist()
        free[picked] = False
        step += 1
        if step % every == 0 or len(chosen) >= t:
            A = Phi[:, chosen]
            w = torch.linalg.lstsq(A, m.unsqueeze(1)).solution.squeeze(1).clamp_min(1e-12)
            r = m - A @ w
    return paper_values(Q, K, V, torch.tensor(chosen, device=K.device), w.log(), scale)


def paper_highest(Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, t: int, scale: float) -> Entry:
    """Highest root-mean-square attention, then clamped least squares for the weights."""
    S = (Q.float() @ K.float().T) * scale
    top = S.amax(1, keepdim=True)
    P = S.softmax(1)
    chosen = P.square().mean(0).topk(t).indices
    Phi = (S[:, chosen] - top).exp()
    m = (S - top).exp().sum(1)
    w = torch.linalg.lstsq(Phi, m.unsqueeze(1)).solution.squeeze(1).clamp(exp(-3), exp(3))
    return paper_values(Q, K, V, chosen, w.log(), scale)


def paper_values(
    Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, chosen: torch.Tensor, beta: torch.Tensor,
    scale: float,
) -> Entry:  # fmt: skip
    """Values by plain least squares."""
    Y = torch.cat([(q.float() @ K.float().T * scale).softmax(1) @ V.float() for q in Q.split(4096)])
    X = (Q.float() @ K[chosen].float().T * scale + beta).softmax(1)
    return K[chosen], beta, torch.linalg.lstsq(X, Y).solution


# ---- parts --------------------------------------------------------------------------------------


def measure_fits(device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds a head and chunk."""
    make = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make, device=device).bfloat16()

    scale = DIM**-0.5
    K = [normal(HEADS, KEYS, DIM) for _ in range(CHUNKS)]
    V = [normal(HEADS, KEYS, DIM) for _ in range(CHUNKS)]
    Q = 2 * normal(HEADS, QUERIES, DIM)
    jobs: dict[str, Callable[[], object]] = {
        "paper OMP": lambda: paper_omp(Q[0], K[0][0], V[0][0], ENTRIES, scale, 1, 1),
        "paper OMP, k = 4, interval 2": lambda: paper_omp(
            Q[0], K[0][0], V[0][0], ENTRIES, scale, 4, 2
        ),
        "paper highest attention": lambda: paper_highest(Q[0], K[0][0], V[0][0], ENTRIES, scale),
    }
    found = {
        name: seconds(device, job, 1 if name == "paper OMP" else repeats)
        for name, job in jobs.items()
    }
    for name in ("omp", "omp-no-bias", "highest-attention"):
        whole = seconds(device, lambda name=name: ours(name, Q, K, V, scale), repeats)
        found[f"{name}, all heads and chunks together"] = whole / (HEADS * CHUNKS)
    return {"heads": HEADS, "chunks": CHUNKS, "keys": KEYS, "queries": QUERIES, "dim": DIM,
            "entries": ENTRIES, "sample": SAMPLE, "repeats": repeats,
            "seconds per head and chunk": found}  # fmt: skip


def ours(
    name: str, Q: torch.Tensor, K: Sequence[torch.Tensor], V: Sequence[torch.Tensor], scale: float
) -> None:
    """Scores from all queries, then selection and fits with SAMPLE of them."""
    method, logits = methods.get(name), Logits(scale)
    rows = torch.linspace(0, Q.shape[1] - 1, SAMPLE, device=Q.device).long()
    layers = []
    for keys, values in zip(K, V, strict=True):
        state = ScoreState(*keys.shape[:2], device=keys.device, kinds=("max",))
        W = state.update(Q, keys, logits)
        lengths = [ENTRIES] * keys.shape[0]
        sample = Sample(Q[:, rows], W[:, rows], logits)
        layers.append(LayerInput(sample, keys, values, state.scores("max"), lengths))
    for _ in compact_layers(method, layers):
        pass


def seconds(device: torch.device, job: Callable[[], object], repeats: int) -> float:
    """Median of some runs after one that does not count."""
    job()
    times = []
    for _ in range(repeats):
        began = stopwatch(device)
        job()
        times.append(stopwatch(device) - began)
    gc.collect()
    return statistics.median(times)


def measure_quality(device: torch.device, models: Sequence[str]) -> list[dict[str, Any]]:
    """Held-out errors on trained heads, a row a model: mean over all of its heads."""
    return [judged(name, device) for name in models]


def judged(name: str, device: torch.device, t: int = 100) -> dict[str, Any]:
    """One model on one register, `t` entries for each head."""
    loaded = load(name, device=str(device), dtype="float32")
    context = prefill(loaded, Source("register", generate(3, 2000).text))
    found = collect(
        context, repeat_passages(context), max_queries=8192, kinds=("max",), progress=Silent()
    )
    held = heldout.queries(context, 0, Silent())
    unbiased = methods.get("omp-no-bias")
    ours = {name: methods.get(name) for name in ("omp", "omp-no-bias", "highest-attention")}
    ours["omp-no-bias, one key a panel"] = replace(unbiased, panel=1)
    ours["omp-no-bias, one key a panel, all keys candidates"] = replace(
        unbiased, panel=1, candidates=KEYS
    )
    errors: dict[str, list[FitErrors]] = {}

    def judge(title: str, i: int, h: int, entry: Entry) -> None:
        keys, beta, values = entry
        K, V = live_keys(context, i)
        sample = held[i].sample
        queries = sample.queries(K, V).of([h])
        error = fit_errors(queries, sample.logits, keys[None], beta[None], values[None])
        errors.setdefault(title, []).append(error)

    for i in full_layers(context):
        K, V = live_keys(context, i)
        x, ranked = found[i].sample, found[i].ranked("max")
        scale = x.logits.scale
        for h in range(K.shape[0]):
            judge("paper OMP", i, h, paper_omp(x.Q[h], K[h], V[h], t, scale, 1, 1))
            fast = paper_omp(x.Q[h], K[h], V[h], t, scale, 4, 2)
            judge("paper OMP, k = 4, interval 2", i, h, fast)
        for title, method in ours.items():
            layer = LayerInput(x, K, V, ranked, [t] * K.shape[0])
            [(_, result)] = compact_layers(method, [layer])
            entries = result.heads
            for h, (keys, values, beta) in enumerate(entries.heads()):
                bias = torch.zeros(len(keys), device=keys.device) if beta is None else beta
                judge(title, i, h, (keys, bias, values))
    return {
        "model": Path(name).name, "tokens": context.T, "entries": t, "heads": len(errors["omp"]),
        "held-out": {
            title: {"mass": mean(float(e.mass) for e in all_),
                    "output": mean(float(e.output) for e in all_)}
            for title, all_ in errors.items()
        },
    }  # fmt: skip


def mean(values: Iterator[float]) -> float:
    """To four digits."""
    return float(f"{statistics.mean(values):.4g}")


def measure_whole(progress: Progress, repeats: int) -> Iterator[dict[str, Any]]:
    """Qwen3-4B's shape, 60,000 tokens, 50x."""
    loaded = shaped("qwen3-4b")
    cases = [
        Request(ratio=50, method="omp", queries="repeat", store="int4", max_queries=10_000),
        Request(ratio=50, method="highest-attention", queries="repeat", store="int4"),
        Request(ratio=50, method="omp", queries="repeat+self-study"),
    ]
    for i, case in enumerate(cases):
        yield bench.measure(loaded, 60_000, case, repeats if i == 0 else 1, progress)


def measure_growth(progress: Progress, largest: int) -> Iterator[dict[str, Any]]:
    """The same shape at doubling lengths, once each."""
    loaded = shaped("qwen3-4b")
    options = Request(ratio=50, method="omp", queries="repeat", store="int4")
    for k in range(6):
        if 4096 << k <= largest:
            yield bench.measure(loaded, 4096 << k, options, 1, progress)


def measure_cpu(progress: Progress, repeats: int) -> list[dict[str, Any]]:
    """The model in the box on the processor, and seconds of the command as it is typed."""
    loaded = load("pocket", device="cpu")
    found = bench.measure(loaded, 4000, Request(ratio=20), repeats, progress)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doc.txt"
        path.write_text(bench.document(loaded, 4000, 0), encoding="utf-8")
        words = [sys.executable, "-m", "amcli", "-q", "compact", str(path), "-o", f"{path}.amkv"]
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            subprocess.run([*words, "--device", "cpu", "--force"], check=True, stdout=-3)
            times.append(time.perf_counter() - began)
    return [found | {"command_seconds": statistics.median(times)}]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds of each stage, and peak memory, against the length of the document."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.axes import Axes

    tokens = [row["tokens"] for row in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left: Axes = axes[0]
    right: Axes = axes[1]
    styles = {"prefill": "k--o", "reference": "C0-s", "compact": "C1-^", "errors": "C2-v"}
    for name, style in {**styles, "write": "C3-D"}.items():
        times = [next(s["seconds"] for s in row["stages"] if s["stage"] == name) for row in rows]
        left.loglog(tokens, times, style, label=name, markersize=4, linewidth=1.2)
    left.set_ylabel("seconds")
    left.legend(frameon=False, fontsize=8)
    right.semilogx(tokens, [row["peak_memory"] / 1e9 for row in rows], "k-o", markersize=4)
    right.set_ylabel("peak GPU memory, GB")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xlabel("tokens of the document")
        axis.set_xticks(tokens, [f"{t // 1000}k" for t in tokens])
        axis.minorticks_off()
        axis.grid(color="0.9")
    figure.savefig(path, dpi=150)


PARTS = ("fits", "quality", "whole", "growth", "cpu")


def main() -> None:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", type=int, default=131_072, help="tokens, for growth")
    parser.add_argument("--models", nargs="*", default=["pocket"], help="for quality")
    parser.add_argument("--plot", type=Path, help="draw the growth that is in the JSON, and stop")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    about = {"date": today(), "hardware": hardware(device), "tools": tools(), "seed": 0}
    if args.plot is not None:
        draw(record["growth"]["found"], args.plot)
        return
    progress: Any = Bar() if animated() else Silent()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for part in args.parts or PARTS[:-1]:
        if part == "fits":
            found: Any = measure_fits(device, args.repeats)
        elif part == "quality":
            found = measure_quality(device, args.models)
        elif part == "whole":
            found = measure_whole(progress, args.repeats)
        elif part == "growth":
            found = measure_growth(progress, args.largest)
        else:
            found = measure_cpu(progress, args.repeats)
        several = [] if isinstance(found, Iterator) else None
        for one in found if several is not None else [found]:
            if several is not None:
                several.append(one)
            record[part] = {**about, "found": one if several is None else several}
            args.json.write_text(json.dumps(record, indent=1) + "\n")
            print(part, json.dumps(one, indent=1)[:3000], flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
