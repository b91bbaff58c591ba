"""How a decode step is captured and run again, by the kind of device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache as once

import torch


class Graph:
    """A step that was captured, and the tensor that is its result each time it is replayed."""

    out: torch.Tensor

    def __init__(self, step: Callable[[], torch.Tensor], device: torch.device) -> None:
        raise NotImplementedError

    def replay(self) -> None:
        """Run it again, on the same tensors."""
        raise NotImplementedError

    @staticmethod
    def strictly() -> AbstractContextManager[None]:
        """A context in which it is an error to wait for the device, as nothing captured may."""
        raise NotImplementedError


class CudaGraph(Graph):
    """A CUDA graph."""

    def __init__(self, step: Callable[[], torch.Tensor], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # The outer context leaves the current stream as it was, also if ending the capture fails.
        with torch.cuda.stream(torch.cuda.current_stream(device)):
            stream = _stream(device)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self.out = step()

    def replay(self) -> None:
        """Run it again, on the same tensors."""
        self._graph.replay()

    @staticmethod
    @contextmanager
    def strictly() -> Iterator[None]:
        """Errors for calls that wait, of which PyTorch knows nearly all."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says that it does not know all of them
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@once
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, since each stream that multiplies keeps memory of its own for it."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


GRAPHS: dict[str, type[Graph]] = {"cuda": CudaGraph}
"""How steps are captured, by the kind of device."""
