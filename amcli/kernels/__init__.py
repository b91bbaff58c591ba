"""Triton kernels that more than one room uses; `amcli.fused` decides whether they run."""

from amcli.fused import Fused

STATISTICS = Fused("statistics", "amcli.kernels.statistics")
