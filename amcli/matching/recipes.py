"""The tool's own methods; `catalogue` lists them. Others to compare with are in `baselines`."""

from __future__ import annotations

from dataclasses import replace

from amcli.matching.methods import Method

_SOURCE = "repeat+quotes"

OMP = Method(name="omp", source=_SOURCE, store="auto", mass="nnls")

OMP_NO_BIAS = replace(OMP, name="omp-no-bias", mass="none")

HIGHEST_ATTENTION = Method(name="highest-attention", source=_SOURCE, selection="top", store="auto")

KEEP = Method(
    name="keep",
    queries=False,
    selection="all",
    mass="none",
    values="original",
    budget="all",
)
