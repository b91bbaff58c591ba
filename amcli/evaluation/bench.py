"""How long each stage of a compaction takes, compared with what the device can do.

The ceilings are measured in the same run: a large matrix product in the model's dtype and in
float32, and a copy. FLOPs are counted from shapes: a multiply-add is two, attention counts what a
causal mask lets through, and elementwise work counts nothing, nor does the attention of reference
passages to themselves. So a share of the ceiling says how much of the device a stage uses at
least, not how good its kernels are.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amcli.evaluation.results import today
from amcli.evaluation.runner import hardware
from amcli.generator.documents import generate
from amcli.models.geometry import decoder_of
from amcli.models.loading import LoadedModel
from amcli.models.spoken import whole_text
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.estimate import fit_flop, product
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context, full_layers
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.storage.artifacts import Artifact
from amcli.system.clock import fastest, stopwatch
from amcli.system.progress import Progress
from amcli.system.versions import tools

STAGES = ("prefill", "self-study", "reference", "compact", "errors", "write", "load")
"""Stages in the order they run; `reference` includes the scores of every key by every query,
`errors` the choice of the store, which the same queries decide."""


@dataclass(frozen=True)
class Stage:
    """One stage: median seconds, and the least work it has to do.

    flop   floating-point operations; None if not counted
    bytes  bytes read or written, for stages that move a file
    """

    name: str
    seconds: float
    flop: float | None = None
    bytes: float | None = None

    def record(self, ceilings: dict[str, float]) -> dict[str, Any]:
        """The stage as JSON, with its shares of the ceilings."""
        found: dict[str, Any] = {"stage": self.name, "seconds": round(self.seconds, 4)}
        if self.flop is not None and self.seconds > 0:
            rate = self.flop / self.seconds
            found |= {"flop": self.flop, "flop_per_s": rate}
            found["share_of_product"] = round(rate / ceilings["product"], 4)
        if self.bytes is not None and self.seconds > 0:
            rate = self.bytes / self.seconds
            found |= {"bytes": self.bytes, "bytes_per_s": rate}
            found["share_of_copy"] = round(rate / ceilings["copy"], 4)
        return found


class _Totals:
    """A `Progress` that counts the units of each stage and passes them on to another."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.units: defaultdict[str, int] = defaultdict(int)

    def start(self, stage: str, total: int) -> None:
        """Begins a stage of `total` units."""
        self.units[stage] += total
        self.progress.start(stage, total)

    def advance(self, units: int = 1) -> None:
        """Counts units as done."""
        self.progress.advance(units)


def measure(
    loaded: LoadedModel, tokens: int, request: Request, repeats: int, progress: Progress
) -> dict[str, Any]:
    """Stages of a compaction of a document of `tokens` tokens, medians over `repeats` runs.

    A short document goes first, so that compilation and look-ups are not timed.
    """
    text = document(loaded, tokens, request.seed)
    _run(loaded, document(loaded, min(tokens, 1024), request.seed), request, progress)
    runs = [_run(loaded, text, request, progress) for _ in range(repeats)]
    limits = ceilings(loaded.device, loaded.dtype)
    first = runs[0]
    stages = [
        Stage(
            name,
            statistics.median(run.seconds[name] for run in runs),
            first.flop.get(name),
            first.bytes.get(name),
        )
        for name in STAGES
        if name in first.seconds
    ]
    after = sum(stage.seconds for stage in stages if stage.name not in ("prefill", "load"))
    return {
        "amkv_bench": 1,
        "date": today(),
        "hardware": hardware(loaded.device),
        "tools": tools(),
        "model": loaded.id,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "tokens": first.tokens,
        "options": {k: v for k, v in vars(request).items() if v is not None},
        "queries": first.queries,
        "ratio": round(first.ratio, 3),
        "stored_bytes": first.stored_bytes,
        "repeats": repeats,
        "ceilings": limits,
        "stages": [stage.record(limits) for stage in stages],
        "after_prefill": round(after, 4),
        "peak_memory": first.peak,
    }


def document(loaded: LoadedModel, tokens: int, seed: int) -> str:
    """A generated register of about `tokens` of the model's tokens."""
    size = max(64, tokens)
    while True:
        text = generate(seed, size).text
        ids = loaded.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            return whole_text(loaded.tokenizer, ids[:tokens])
        size = int(1.2 * size * tokens / max(1, len(ids))) + 64


@dataclass
class _Run:
    """What one run took."""

    seconds: dict[str, float]
    flop: dict[str, float]
    bytes: dict[str, float]
    tokens: int
    queries: str
    ratio: float
    stored_bytes: int
    peak: int | None


def _run(loaded: LoadedModel, text: str, request: Request, progress: Progress) -> _Run:
    device, totals = loaded.device, _Totals(progress)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = stopwatch(device)
    context = prefill(loaded, Source("bench", text), progress=totals)
    seconds = {"prefill": stopwatch(device) - began}
    found = compact(context, request, progress=totals)
    seconds |= found.seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.amkv"
        began = stopwatch(device)
        found.save(path, overwrite=False)
        seconds["write"] = stopwatch(device) - began
        size = path.stat().st_size
        began = stopwatch(device)
        with Artifact.open(path) as artifact:
            restore(artifact, loaded)
        seconds["load"] = stopwatch(device) - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return _Run(
        seconds,
        _flop(context, found, totals),
        {"write": float(size), "load": float(size)},
        context.T,
        found.plan.queries.name,
        found.ratio,
        found.stored_bytes,
        peak,
    )


def _flop(context: Context, found: Compaction, totals: _Totals) -> dict[str, float]:
    """Floating-point operations of the stages that consist of products."""
    geometry, T = context.loaded.geometry, context.T
    model: Any = context.loaded.model
    embedding = model.get_input_embeddings().weight.numel()
    parameters = decoder_of(model).parameters()
    weights = sum(p.numel() for p in parameters) - embedding
    pairs = 0.0  # multiply-adds of one query with one key, and of one weight with one value
    scored = 0.0  # those for the scores alone
    for i, (heads, layer) in enumerate(zip(geometry.query_heads, geometry.layers, strict=True)):
        if i in full_layers(context):
            pairs += heads * (layer.key_dim + layer.value_dim)
            scored += heads * layer.key_dim
    fed = totals.units["reference pass"]
    return {
        "prefill": 2.0 * weights * T + 2.0 * pairs * T * T / 2,
        "reference": 2.0 * weights * fed + 2.0 * (pairs + scored) * fed * T,
        "compact": _fit_flop(context, found),
    }


def _fit_flop(context: Context, found: Compaction) -> float:
    """Floating-point operations of the fits of all heads; see `estimate.fit_flop`."""
    method, n = found.plan.method, found.query_count
    return sum(
        fit_flop(method, context.T, layer.key_dim, layer.value_dim, t, n)
        for i, layer in enumerate(context.loaded.geometry.layers)
        if layer.type == "full"
        for t in found.layers[i].lengths
    )


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured FLOP/s of a product in the model's dtype (`product`) and in float32 (`float32`), and
    bytes/s of a copy, reads plus writes (`copy`)."""
    x = torch.zeros((1 << 28) if device.type == "cuda" else (1 << 24), device=device)
    y = torch.empty_like(x)
    return {
        "product": product(device, dtype, repeats=10),
        "float32": product(device, torch.float32, repeats=10),
        "copy": 2.0 * x.nbytes / fastest(device, lambda: y.copy_(x), repeats=10),
    }


def table(record: dict[str, Any], bytes_text: Callable[[float], str]) -> Sequence[Sequence[str]]:
    """Rows of stage, seconds, rate and share of the ceiling, as text."""
    rows = []
    for stage in record["stages"]:
        rate = share = ""
        if "flop_per_s" in stage:
            rate = f"{stage['flop_per_s'] / 1e12:.3g} TFLOP/s"
            share = f"{stage['share_of_product']:.0%} of a product"
        elif "bytes_per_s" in stage:
            rate = f"{bytes_text(stage['bytes_per_s'])}/s"
            share = f"{stage['share_of_copy']:.1%} of a copy"
        rows.append((stage["stage"], f"{stage['seconds']:.3g} s", rate, share))
    return rows
