"""What stands in for CUDA graphs on a CPU: the operations of a step, run again on the same tensors.

Nothing of Python is run again, so whatever changes from step to step has to be in a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amcli.models.graphs import Graph

WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")


class Recorder(TorchDispatchMode):
    """Notes operations, and what was in the tensors of others that they have written to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor], bool]] = []
        self.made: dict[int, Any] = {}
        self.before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        # Lists of numbers from Python have to be copied to the device.
        if name in WAITING or (name == "lift_fresh" and args[0].ndim):
            raise RuntimeError(f"{func} waits for the device")
        writes = self._written(func, args, kwargs)
        for tensor in writes:
            storage = tensor.untyped_storage()
            place = storage._cdata
            if place not in self.made and place not in self.before:
                self.before[place] = storage, storage.clone()
        found = func(*args, **kwargs)
        outs = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        views = any(x.alias_info is not None for x in func._schema.returns)
        if not views:
            self.made.update((x.untyped_storage()._cdata, x) for x in outs)
        self.calls.append((func, args, kwargs, [] if writes else outs, views and not writes))
        return found

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        found: list[Any] = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found += tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
        return [x for x in found if isinstance(x, torch.Tensor)]


class Recorded(Graph):
    """The operations of a step. As when a graph is captured, nothing has run when it is made."""

    made = 0

    def __init__(self, step: Callable[[], torch.Tensor], device: torch.device) -> None:
        type(self).made += 1
        with Recorder() as found:
            self.out = step()
        for storage, before in found.before.values():
            storage.copy_(before)
        self._calls = [call[:4] for call in found.calls if not call[4]]

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outs in self._calls:
            found = tree_leaves(func(*args, **kwargs))
            new = [x for x in found if isinstance(x, torch.Tensor)][: len(outs)]
            for old, x in zip(outs, new, strict=True):
                old.copy_(x)

    @staticmethod
    @contextmanager
    def strictly() -> Iterator[None]:
        with Recorder():
            yield
