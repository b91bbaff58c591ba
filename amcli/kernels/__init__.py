"""Triton kernels, and what stands in for them where they cannot run; see `fused`.

Knows torch and the entries of layers; knows nothing of models, files or methods.
"""

from amcli.kernels.fused import Fused

STATISTICS = Fused("statistics", "amcli.kernels.statistics")
