"""Triton kernels where they run, plain PyTorch where they do not: the choice, in one place.

Triton compiles a kernel when it is first needed, with a C compiler that a machine may lack, for a
GPU that may be too old or too small. The result has to be the same there, only slower.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from amcli.errors import AmkvWarning


class Fused:
    """The kernels of one module, which may be given by its name: then it is imported when they are
    first needed.

    what    what they are for, as a warning names it
    broken  why they cannot run here, after a failure: from then on the plain path is used
    """

    def __init__(self, what: str, module: str | ModuleType) -> None:
        self.what = what
        self.broken: list[str] = []
        self._name = module if isinstance(module, str) else ""
        self._module = None if isinstance(module, str) else module
        self._looked = self._module is not None

    def module(self) -> ModuleType | None:
        """The module; None where Triton is not installed, or the kernels failed before."""
        if not self._looked:
            self._looked = True
            try:
                self._module = import_module(self._name)
            except ImportError:
                self._module = None
        return None if self.broken else self._module

    def run(self, on: torch.Tensor, call: Callable[[ModuleType], Any]) -> Any:
        """The result of `call(module)` on the device of `on`; None if it cannot run.

        Errors of the device itself, such as full memory, are raised unchanged.
        """
        module = self.module()
        if module is None:
            return None
        try:
            # Triton launches on the current device, wherever the tensors are.
            with torch.cuda.device_of(on):  # type: ignore[no-untyped-call]
                return call(module)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            self.broken.append(f"{type(error).__name__}: {error}")
            warnings.warn(
                f"the {self.what} kernels cannot run here, so it takes longer: {self.broken[0]}",
                AmkvWarning,
                stacklevel=2,
            )
            return None
