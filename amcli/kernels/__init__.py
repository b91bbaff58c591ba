"""Triton kernels that more than one room uses; `amcli.fused` decides whether they run."""
