"""Timing work on a device that runs asynchronously."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def stopwatch(device: torch.device) -> float:
    """Seconds on a clock, once the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fastest(device: torch.device, call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        began = stopwatch(device)
        call()
        times.append(stopwatch(device) - began)
    return min(times)
