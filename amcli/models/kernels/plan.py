"""The work list of a prefix: equal tiles of entries, so that uneven heads load a GPU evenly.

A tile is up to `tile` consecutive entries of one KV head of one context. One program reads it
once for a block of the query rows that see it, whichever sequences of the batch they come from,
and writes what they got from it to a *slot* for each batch row; `device.reduce` adds up the slots
of a row. Lists are made on the CPU once and kept with the prefix, so that a decode step neither
loops over heads nor waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from amcli.batched import BatchedPrefix, device_of
from amcli.quantize import Entries

PROGRAMS = 132
"""Programs that keep a GPU busy: the multiprocessors of a Hopper. Twice as many, and the time to
join their results outweighs what they gain."""

MIN_TILE, MAX_TILE = 64, 1 << 14


@dataclass(frozen=True)
class Plan:
    """Tables for one prefix, one batch size and one tile size; int32, on the device.

    tiles  `[tiles, 8]`: first flat entry, entries, KV head, first slot, where the rows of its
           context start in `order`, how many they are, 0, 0
    order  `[B]`: batch rows, context after context
    heads  `[P * H, 2]`: first slot and number of tiles of head `p * H + h`
    rows   `[B, 4]`: context `p`, index among the rows of `p`, how many those are, 0
    slots  slots in all
    most   batch rows of the context that most of them see
    """

    tiles: torch.Tensor
    order: torch.Tensor
    heads: torch.Tensor
    rows: torch.Tensor
    slots: int
    most: int


def tile_size(keys: int, blocks: int, most: int = MAX_TILE) -> int:
    """Keys of a tile, a power of two, when `keys` in all are each read by `blocks` programs.

    Small enough to occupy the device, and otherwise as large as it may be: each tile costs a
    slot in memory for every row.
    """
    wanted = max(1, keys * blocks // PROGRAMS)
    return max(MIN_TILE, min(most, MAX_TILE, 1 << (wanted.bit_length() - 1)))


def plan_of(prefix: Entries | BatchedPrefix, batch: int, tile: int) -> Plan:
    """The plan, made at the first call and kept on the prefix itself: it goes when that goes."""
    plans: dict[tuple[int, int], Plan] = vars(prefix).setdefault("_plans", {})
    plan = plans.get((batch, tile))
    if plan is None:
        plan = plans[batch, tile] = make_plan(prefix, batch, tile)
    return plan


def make_plan(prefix: Entries | BatchedPrefix, batch: int, tile: int) -> Plan:
    """See `Plan`. ValueError when a batched prefix has another number of rows than `batch`."""
    if isinstance(prefix, BatchedPrefix):
        entries, H, seen = prefix.entries, prefix.kv_heads, torch.tensor(prefix.rows)
        if len(prefix.rows) != batch:
            raise ValueError(f"a prefix for {len(prefix.rows)} rows, queries of {batch}")
    else:
        entries, H, seen = prefix, len(prefix.lengths), torch.zeros(batch, dtype=torch.long)
    lengths = torch.tensor(entries.lengths)  # [P * H]
    offsets = lengths.cumsum(0) - lengths
    readers = torch.bincount(seen, minlength=len(lengths) // H)  # [P]
    order = seen.argsort(stable=True)  # [B]
    order_start = readers.cumsum(0) - readers  # [P]
    index = torch.empty_like(order)
    index[order] = torch.arange(batch) - order_start[seen[order]]

    # A context that no row sees gets no tiles.
    per_head = (lengths + tile - 1) // tile * (readers > 0).repeat_interleave(H)  # [P * H]
    first_tile = per_head.cumsum(0) - per_head
    head = torch.repeat_interleave(torch.arange(len(lengths)), per_head)  # [tiles]
    done = (torch.arange(len(head)) - first_tile[head]) * tile
    context = head // H
    slots = readers[context]
    slot = slots.cumsum(0) - slots
    head_slot = torch.zeros_like(lengths)
    head_slot[per_head > 0] = slot[first_tile[per_head > 0]]

    none, nobody = torch.zeros_like(head), torch.zeros_like(seen)
    first, count = offsets[head] + done, (lengths[head] - done).clamp(max=tile)
    tables = (
        (first, count, head % H, slot, order_start[context], slots, none, none),
        (order,),
        (head_slot, per_head),
        (seen, index, readers[seen], nobody),
    )
    columns = [torch.stack(table, dim=1).int() for table in tables]
    # One copy to the device, because each waits for it.
    flat = torch.cat([x.view(-1) for x in columns]).to(device_of(entries))
    parts = torch.split(flat, [x.numel() for x in columns])
    tiles, by_context, heads, rows = (p.view_as(x) for p, x in zip(parts, columns, strict=True))
    return Plan(tiles, by_context.view(-1), heads, rows, int(slots.sum()), int(readers.max()))
