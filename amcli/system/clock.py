"""Timing work on a device that runs asynchronously."""

from __future__ import annotations

import time

import torch


def stopwatch(device: torch.device) -> float:
    """Seconds on a clock, once the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
