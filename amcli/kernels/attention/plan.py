"""The work list of a prefix: equal tiles of entries, so that uneven heads load a GPU evenly.

A tile is up to `tile` consecutive entries of one KV head of one context; of keys in groups, it
begins with a group. One program reads it
once for a block of the query rows that see it, whichever sequences of the batch they come from,
and writes their results to a *slot* for each batch row; `device.reduce` joins the slots of a row.
Lists are made once on the CPU and kept with the prefix, so a decode step neither loops over heads
nor waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from amcli.entries.grouped import GROUP, Grouped
from amcli.entries.prefix import Prefix

PROGRAMS = 132
"""Programs that keep a GPU busy: the multiprocessors of a Hopper. With twice as many, joining the
results costs more than they gain."""

MIN_TILE, MAX_TILE = 64, 1 << 14


@dataclass(frozen=True)
class Plan:
    """Tables for one prefix, one batch size and one tile size; int32, on the device.

    tiles  `[tiles, 8]`: first flat entry, entries, KV head, first slot, where the rows of its
           context start in `order`, how many there are, first group, 0
    order  `[B]`: batch rows, context after context
    heads  `[P * H, 2]`: first slot and number of tiles of head `p * H + h`
    rows   `[B, 4]`: context `p`, index among the rows of `p`, how many of those there are, 0
    slots  total number of slots
    most   batch rows of the context that the most rows see
    """

    tiles: torch.Tensor
    order: torch.Tensor
    heads: torch.Tensor
    rows: torch.Tensor
    slots: int
    most: int


def tile_size(keys: int, blocks: int, most: int = MAX_TILE) -> int:
    """Keys per tile, a power of two, when each of `keys` keys is read by `blocks` programs.

    Small enough to occupy the device, otherwise as large as possible: each tile costs a slot in
    memory for every row.
    """
    wanted = max(1, keys * blocks // PROGRAMS)
    return max(MIN_TILE, min(most, MAX_TILE, 1 << (wanted.bit_length() - 1)))


def plan_of(prefix: Prefix, batch: int, tile: int) -> Plan:
    """The plan, made at the first call and kept on the prefix, as long as the prefix lives."""
    name = "plan of the attention kernels", batch, tile
    plan: Plan | None = prefix.derived.get(name)
    if plan is None:
        plan = prefix.derived[name] = make_plan(prefix, batch, tile)
    return plan


def make_plan(prefix: Prefix, batch: int, tile: int) -> Plan:
    """See `Plan`. ValueError when a prefix for a batch does not have `batch` rows.

    In NumPy, whose small operations take a fraction of PyTorch's time: a loaded context needs one
    plan per layer before its first token.
    """
    entries, H = prefix.entries, prefix.kv_heads
    if prefix.batch is not None and len(prefix.batch) != batch:
        raise ValueError(f"a prefix for {len(prefix.batch)} rows, queries of {batch}")
    seen = np.zeros(batch, dtype=np.int64) if prefix.batch is None else np.array(prefix.batch)
    lengths = np.array(entries.lengths)  # [P * H]
    offsets = np.array(entries.offsets)
    readers = np.bincount(seen, minlength=len(lengths) // H)  # [P]
    order = seen.argsort(kind="stable")  # [B]
    order_start = readers.cumsum() - readers  # [P]
    index = np.empty_like(order)
    index[order] = np.arange(batch) - order_start[seen[order]]

    # Pieces of heads in which groups begin anew: the heads, unless contexts were joined.
    keys = entries.keys
    runs = np.array(keys.runs if isinstance(keys, Grouped) else entries.lengths, dtype=np.int64)
    starts = runs.cumsum() - runs
    head_of = np.minimum(offsets[1:].searchsorted(starts, "right"), len(lengths) - 1)
    groups = -(-runs // GROUP)

    # A context that no row sees gets no tiles.
    per_run = -(-runs // tile) * (readers > 0)[head_of // H]
    per_head = np.zeros_like(lengths)
    np.add.at(per_head, head_of, per_run)  # [P * H]
    first_tile = per_head.cumsum() - per_head
    run = np.arange(len(runs)).repeat(per_run)  # [tiles]
    done = (np.arange(len(run)) - (per_run.cumsum() - per_run)[run]) * tile
    head = head_of[run]
    context = head // H
    slots = readers[context]
    slot_ends = slots.cumsum()
    # The slots before a head's first tile; a head without tiles has no slot to begin with.
    head_slot = np.append(0, slot_ends)[first_tile]

    first, count = starts[run] + done, np.minimum(runs[run] - done, tile)
    group = (groups.cumsum() - groups)[run] + done // GROUP
    tables = (
        (8, first, count, head % H, slot_ends - slots, order_start[context], slots, group),
        (1, order),
        (2, head_slot, per_head),
        (4, seen, index, readers[seen]),
    )
    # One buffer, because each copy to the device has to wait.
    sizes = [width * len(columns[0]) for width, *columns in tables]
    flat = np.zeros(sum(sizes), dtype=np.int32)
    start = 0
    for (width, *columns), size in zip(tables, sizes, strict=True):
        table = flat[start : start + size].reshape(-1, width)
        for i, column in enumerate(columns):
            table[:, i] = column
        start += size
    tiles, by_context, heads, rows = torch.split(torch.from_numpy(flat).to(entries.device), sizes)
    return Plan(
        tiles.view(-1, 8),
        by_context,
        heads.view(-1, 2),
        rows.view(-1, 4),
        int(slots.sum()),
        int(readers.max()),
    )
