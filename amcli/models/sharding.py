"""Tensor parallelism: which of a model's KV heads a process has, and how they are gathered.

transformers splits a model among the processes that `torchrun` starts; each then sees its own
heads as if they were all. A cache, and all that is computed from it, stays with the process that
owns the heads. What concerns the whole document (files, budgets, errors) is gathered here. Every
method except `mine` has to be called by all processes, in the same order.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TypeVar, cast

import torch
from torch import distributed
from transformers import PreTrainedConfig

from amcli.entries import stores
from amcli.entries.ragged import Entries
from amcli.errors import UsageError
from amcli.system.processes import launched

Found = TypeVar("Found")


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `size`: it has every layer's KV heads `rank·n` to `rank·n + n - 1`, `n`
    the layer's heads divided by `size`."""

    rank: int = 0
    size: int = 1

    def mine(self, entries: Entries) -> Entries:
        """This process's heads out of all heads."""
        if self.size == 1:
            return entries
        n = len(entries.lengths) // self.size
        return entries.of_heads(self.rank * n, (self.rank + 1) * n)

    def whole(self, entries: Entries) -> Entries:
        """The entries of all processes' heads, in order, on this process's device."""
        if self.size == 1:
            return entries
        tensors = {name: self.gathered(x) for name, x in entries.tensors().items()}
        lengths = tuple(t for part in self.everywhere(entries.lengths) for t in part)
        return stores.read(entries.store, tensors, lengths)

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """The rows `[n, …]` of all processes, in order of rank; `n` may differ."""
        if self.size == 1:
            return x
        counts = self.everywhere(x.shape[0])
        if not max(counts):
            return x
        # As bytes, which every backend moves, whatever the dtype.
        numbers = prod(x.shape[1:])
        width = numbers * x.element_size()
        mine = torch.zeros((max(counts), width), dtype=torch.uint8, device=x.device)
        if x.numel():
            flat = x.detach().contiguous().reshape(x.shape[0], numbers)
            mine[: x.shape[0]] = flat.view(torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(parts, mine)
        rows = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
        return rows.view(x.dtype).reshape(sum(counts), *x.shape[1:])

    def everywhere(self, what: Found) -> list[Found]:
        """The `what` of each process, in order of rank; anything that can be pickled."""
        if self.size == 1:
            return [what]
        found: list[object] = [None] * self.size
        distributed.all_gather_object(found, what)
        return cast("list[Found]", found)

    def once(self, make: Callable[[], Found]) -> Found:
        """What `make` returns in the first process, which alone runs it; for writing files."""
        if self.size == 1:
            return make()
        found: list[object] = [make() if self.rank == 0 else None]
        distributed.broadcast_object_list(found, src=0)
        return cast(Found, found[0])


def here(config: PreTrainedConfig) -> Shard:
    """The shard of a model with that configuration that this process will have.

    Raises UsageError for a model whose KV heads do not divide evenly, or without a sharding plan.
    """
    size = launched()
    if size == 1:
        return Shard()
    text = config.get_text_config(decoder=True)
    if not getattr(text, "base_model_tp_plan", None):
        raise UsageError(
            f"transformers has no tensor-parallel plan for {config.model_type}",
            "start one process, with device='auto' for several GPUs",
            code="model-not-divisible",
            field="model",
            model=config.model_type,
        )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % size:
        raise UsageError(
            f"{heads} KV heads cannot be divided among {size} processes",
            f"start a number of processes that divides {heads}",
            code="heads-not-divisible",
            field="model",
            heads=heads,
            processes=size,
        )
    return Shard(int(os.environ["RANK"]), size)


def leave_at_exit() -> None:
    """Keep the process group that transformers made until this process ends."""
    atexit.unregister(distributed.destroy_process_group)
    if distributed.is_initialized():
        atexit.register(distributed.destroy_process_group)
