"""What carrying out a plan will take: memory, and seconds, before anything is loaded.

Seconds are counted operations over measured speed. The operations follow from the shapes: the
model's passes over the document, the scores of all keys, the products of the fits. The speed is
that of one product of matrices on the device, measured in a moment. A stage reaches a share of it,
and pays for each layer however little there is to compute: see `PACE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from amcli.matching.bucket import FIT_LIMIT, PLENTY
from amcli.matching.methods import Method
from amcli.matching.selection import PURSUIT, screened
from amcli.matching.tiles import room_on
from amcli.models.memory import Preview
from amcli.pipeline.compaction.plan import Plan
from amcli.pipeline.queries.passages import PART
from amcli.system.clock import fastest


class Pace(NamedTuple):
    """What a stage reaches of the speed of a product, and the seconds it takes for each layer
    besides."""

    share: float
    layer: float


PACE: dict[str, dict[str, Pace]] = {
    "cuda": {
        "prefill": Pace(0.4, 0.002),
        "reference": Pace(0.44, 0.005),
        "compact": Pace(0.9, 0.006),
    },
    "cpu": {
        "prefill": Pace(0.6, 0.0),
        "reference": Pace(0.7, 0.0),
        "compact": Pace(0.5, 0.0),
    },
}
"""Of an H200 as in docs/benchmarks/speed.json and real/seconds-*.json, and of two cores. The fits
compute in float32, and go by the speed of that."""

_SIDE = {"cpu": 1024}  # of the matrices that are multiplied; elsewhere:
_SIDE_ELSEWHERE = 8192


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a compaction; None: unknown.

    weights, cache  bytes of the model, and of the full cache, with room for the part of the
                    document that is repeated
    fits            the most bytes that the fits may take
    seconds         for each stage
    """

    weights: int | None
    cache: int
    fits: int
    seconds: dict[str, float] | None

    def record(self) -> dict[str, Any]:
        """The estimate as JSON."""
        seconds = self.seconds
        if seconds is not None:
            seconds = {stage: float(f"{spent:.2g}") for stage, spent in seconds.items()}
            seconds["total"] = float(f"{sum(seconds.values()):.2g}")
        memory = {"weights": self.weights, "cache": self.cache, "fits": self.fits}
        return {"memory": memory, "seconds": seconds}


def estimate(plan: Plan, preview: Preview | None, prefilled: bool) -> Estimate:
    """What a plan takes with the model that `preview` shows; without it, seconds are unknown.

    prefilled  whether the document has already been prefilled
    """
    target = plan.target
    cache = target.full_bytes // max(1, target.T) * (target.T + min(PART, target.T))
    device = torch.device("cpu") if preview is None else preview.devices[0]
    fits = room_on(device, plan.memory_limit).bytes
    if preview is None or preview.need.parameters is None or not preview.queries:
        return Estimate(None if preview is None else preview.need.weights, cache, fits, None)
    work = _work(plan, preview.need.parameters, preview.queries, plan.queries.most(device))
    if prefilled:
        del work["prefill"]
    pace = PACE.get(device.type, PACE["cuda"])
    speed = {dtype: product(device, dtype) for dtype in {preview.dtype, torch.float32}}
    seconds = {}
    for stage, flop in work.items():
        steps = _steps(plan.method) if stage == "compact" else 1.0
        reached = speed[torch.float32 if stage == "compact" else preview.dtype] * pace[stage].share
        seconds[stage] = flop / reached + (
            pace[stage].layer * steps * len(plan.layers) if flop else 0.0
        )
    return Estimate(preview.need.weights, cache, fits, seconds)


def _work(plan: Plan, parameters: int, queries: int, n: int) -> dict[str, float]:
    """Floating-point operations of each stage, with fits on `n` reference queries a head."""
    T, layers = plan.target.T, len(plan.layers)
    attention = 4.0 * queries * T * T * layers  # logits and outputs, every token with every token
    read = 2.0 * parameters * T
    work = {"prefill": read + attention / 2}
    if plan.queries.sources:
        # Every token once more, with the whole document before it; then its scores of every key.
        work["reference"] = len(plan.queries.sources) * (read + 1.5 * attention)
    method = plan.method
    fitted = method.selection != "all" and bool(plan.queries.sources)
    work["compact"] = sum(
        x.shape.heads * fit_flop(method, T, x.shape.key_dim, x.shape.value_dim, x.entries, n)
        for x in plan.layers
        if fitted
    )
    return work


def _steps(method: Method) -> float:
    """How many short steps the fits take, in units of those of the values: on a GPU it is these,
    and not their arithmetic, that a short document waits for."""
    return 1.0 + 2.5 * (method.selection == "omp") + 3.0 * method.has_beta


def fit_flop(method: Method, T: int, d: int, dv: int, t: int, n: int) -> float:
    """Floating-point operations of fitting one head: from `T` keys of `d` and values of `dv` to `t`
    entries, on `n` queries. The true outputs of the queries, pursuit if the head loses most of its
    keys, the value fit."""
    f = min(t, FIT_LIMIT)
    total = 2.0 * n * T * (d + dv) + 2.0 * n * t * (d + dv)
    total += n * f * f + 2.0 * n * f * dv + 8 * f**3 / 3
    if method.selection == "omp" and t * PLENTY < T:
        steps = min(t, PURSUIT)
        M = min(T, screened(method.candidates, steps))
        total += 2.0 * n * M * (d + steps) + 2.0 * steps * steps * M
    return total


def product(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """Floating-point operations a second of one large product, in `dtype`: the fastest of some."""
    side = _SIDE.get(device.type, _SIDE_ELSEWHERE)
    x = torch.randn((side, side), device=device).to(dtype)
    return 2.0 * side**3 / fastest(device, lambda: x @ x, repeats)
