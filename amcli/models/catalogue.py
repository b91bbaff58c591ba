"""Names of devices, number formats and models, for help and completion.

Imports nothing, torch least of all.
"""

from __future__ import annotations

POCKET = "pocket"
"""The model in the package."""

AUTO = "auto"
"""The device that stands for all GPUs, layers spread over them."""

DEVICES = ("cpu", "cuda", AUTO)
"""Devices by name; `cuda:N` works too."""

DTYPES: dict[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Dtypes by name, each with its short form."""

SHAPES = ("qwen3-4b", "llama3-8b", "gemma3-12b")
"""Models that `bench` makes with random weights; `shapes` has their sizes."""
