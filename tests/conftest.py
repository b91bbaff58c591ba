"""One thread to a test process: pytest-xdist already starts one process for every core."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

# Here, because PyTorch reads it when it is imported, and this file comes before every test
# module. The tensors of the tests are so small that more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where there is no GPU to compile for, Triton's kernels run in its interpreter; it is chosen when
# Triton is imported, which PyTorch does.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


# As with `python -W error`: tests see what libraries warn of where the program silences them, too,
# and so do the processes that it starts.
sys.warnoptions.append("error")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
