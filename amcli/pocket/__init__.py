"""Pocket: the small model that ships with the package.

A demonstration model: it reads generated registers and handbooks and answers questions about
them. It knows nothing else of the world.
"""

from __future__ import annotations

from pathlib import Path


def folder() -> Path:
    """The packaged model: weights, config, tokenizer and chat template."""
    return Path(__file__).parent / "weights"
