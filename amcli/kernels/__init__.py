"""Kernels that more than one room uses; `amcli.fused` decides whether those of Triton run."""

from amcli.fused import Fused

STATISTICS = Fused("statistics", "amcli.kernels.statistics")
