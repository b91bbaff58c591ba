"""What carrying out a plan will take: memory, and seconds, before anything is loaded.

Seconds are arithmetic divided by speed. The arithmetic is counted from the shapes: the model's
passes over the document, the scores of all keys, the matrices of the fits. The speed is that of
one matrix product on the device, measured on the spot; each stage reaches its SHARE of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from amcli.matching.bucket import FIT_LIMIT, PLENTY
from amcli.matching.selection import PURSUIT, screened
from amcli.matching.tiles import room_on
from amcli.models.memory import Preview
from amcli.pipeline.compaction.plan import LayerPlan, Plan
from amcli.pipeline.queries.passages import PART
from amcli.system.clock import stopwatch

SHARE = {"prefill": 0.4, "reference": 0.35, "compact": 0.4}
"""Fraction of a matrix product's speed that each stage reaches."""

_SIDE = {"cpu": 1024}  # of the matrices multiplied to measure speed; other devices:
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
    work = _work(plan, preview.need.parameters, preview.queries)
    if prefilled:
        del work["prefill"]
    speed = _speed(device, preview.dtype)
    seconds = {stage: flops / (speed * SHARE[stage]) for stage, flops in work.items()}
    return Estimate(preview.need.weights, cache, fits, seconds)


def _work(plan: Plan, parameters: int, queries: int) -> dict[str, float]:
    """Floating-point operations of each stage."""
    T, layers = plan.target.T, len(plan.layers)
    attention = 4.0 * queries * T * T * layers  # logits and outputs, every token with every token
    read = 2.0 * parameters * T
    work = {"prefill": read + attention / 2}
    if plan.queries.sources:
        # Every token once more, with the whole document before it; then its scores of every key.
        work["reference"] = len(plan.queries.sources) * (read + 1.5 * attention)
    n = plan.queries.max_queries
    work["compact"] = sum(_fits(plan, layer, n) for layer in plan.layers)
    return work


def _fits(plan: Plan, layer: LayerPlan, n: int) -> float:
    """The fastest-growing terms of one layer's fits with `n` queries per head."""
    T, t, method = layer.shape.tokens, layer.entries, plan.method
    dims = layer.shape.key_dim + layer.shape.value_dim
    if method.selection == "all" or not plan.queries.sources:
        return 0.0
    fitted = min(t, FIT_LIMIT)
    one = 2.0 * n * T * dims  # attention of the queries to the document
    if method.selection == "omp" and t * PLENTY < T:
        steps = min(t, PURSUIT)
        candidates = min(T, screened(method.candidates, steps))
        one += 2.0 * n * candidates * (dims + candidates) + 2.0 * candidates * steps**2
    if method.mass != "none" or method.values != "original":
        one += 6.0 * n * fitted**2 + 8.0 * fitted**3
    return layer.shape.heads * one


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second in one large matrix product, in `dtype`."""
    side = _SIDE.get(device.type, _SIDE_ELSEWHERE)
    x = torch.ones(side, side, device=device, dtype=dtype)
    took = []
    for _ in range(3):
        began = stopwatch(device)
        torch.mm(x, x)
        took.append(stopwatch(device) - began)
    return 2.0 * side**3 / max(min(took), time.get_clock_info("perf_counter").resolution)
