"""The built-in methods. Importing this module registers them; the first is the default.

The rivals to measure against, each after its paper, are in `baselines`.
"""

from __future__ import annotations

from dataclasses import replace

from amcli.matching.methods import Method, register

OMP = register(
    Method(
        name="omp",
        summary="best keys, pursuit where few are kept, exact biases, shrunk values (default)",
        store="auto",
        mass="nnls",
    )
)

OMP_NO_BIAS = register(
    replace(
        OMP,
        name="omp-no-bias",
        summary="the same without biases, which keep each head's attention mass",
        mass="none",
    )
)

HIGHEST_ATTENTION = register(
    Method(
        name="highest-attention",
        summary="the most attended keys, shrunk values; no pursuit",
        selection="top",
        store="auto",
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
from amcli.matching import baselines as baselines  # noqa: E402

DEFAULT = OMP.name
