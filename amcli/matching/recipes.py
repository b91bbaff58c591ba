"""The built-in methods. Importing this module registers them; the first is the default.

The rivals to measure against, each after its paper, are in `baselines`.
"""

from __future__ import annotations

from .methods import Method, register

OMP = register(
    Method(
        name="omp",
        summary="matching pursuit on mass and outputs, exact biases, shrunk values (default)",
        source="auto",
        store="auto",
    )
)

HIGHEST_ATTENTION = register(
    Method(
        name="highest-attention",
        summary="the most attended keys, exact biases, shrunk values; much faster than omp",
        score_kind="rms",
        source="auto",
        store="auto",
        selection="top",
    )
)

KEEP = register(
    Method(
        name="keep",
        summary="every key and value as it is; the full cache in a file",
        queries=False,
        selection="all",
        mass="none",
        values="original",
        budget="all",
    )
)

# Last, so that the tool's own methods come first wherever methods are listed.
from . import baselines as baselines  # noqa: E402

DEFAULT = OMP.name
