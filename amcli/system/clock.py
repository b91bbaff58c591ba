"""Seconds, where work is done by a device that runs behind."""

from __future__ import annotations

import time

import torch


def stopwatch(device: torch.device) -> float:
    """Seconds on a clock, when the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
