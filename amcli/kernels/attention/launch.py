"""Attention over a prefix through the kernels: what they can do, their shapes, their memory.

Importing this imports Triton. Two launches per call (one more if the store transforms keys, or
values), no wait for the device, no Python loop over heads or entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from amcli.entries.matrix import hadamard
from amcli.entries.prefix import Prefix
from amcli.entries.ragged import Entries
from amcli.kernels.attention import device
from amcli.kernels.attention.forms import FORMS, Form, key_words, operands, takes, value_words
from amcli.kernels.attention.plan import Plan, plan_of, tile_size

MAX_DIM = 256
"""Head dimension up to which a tile fits a multiprocessor's shared memory."""

PART_BYTES = 256 << 20
"""Bytes for the tiles' results; longer chunks of queries are taken in slices."""

DECODE_TILE = 256
"""Most entries of a tile, while the rows that see it fit into one or two blocks."""

PACKED_ROWS = 256
"""Query rows up to which packed stores are read in blocks of 16 rows: on an H200 that was faster
than blocks of 64 for 128 rows, about as fast for 256, and slower for more."""

FEW_ROWS = 2048
"""Query rows up to which latency dominates joining their tiles: use more, shorter programs."""

_STEP_BYTES = 32 << 10  # keys and values of one step: three steps are in flight in shared memory
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def can_attend(query: torch.Tensor, prefix: Prefix) -> bool:
    """Whether the kernels take these inputs: half or single precision, head dimensions up to 256,
    no gradients, and a store that they read."""
    entries = prefix.entries
    if query.dtype not in _DTYPES or (query.requires_grad and torch.is_grad_enabled()):
        return False
    if max(entries.key_dim, entries.value_dim) > MAX_DIM or entries.device != query.device:
        return False
    return takes(entries)


def attend_prefix(
    query: torch.Tensor,
    prefix: Prefix,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    live: torch.Tensor | None,
    at: torch.Tensor | None = None,
    window: int = 0,
) -> torch.Tensor:
    """`attend` for inputs that `can_attend` accepts; same arguments, same result; a `window`
    only together with `at`.

    Products are taken in the dtype of `query`, float32 ones without TF32, and summed in float32.
    """
    B, Hq, m, _ = query.shape
    H, n = keys.shape[1:3]
    dv = values.shape[3]
    entries = prefix.entries
    work = _Work.of(prefix, query.dtype, B, H, Hq // H * m, n)
    step = max(16, m * PART_BYTES // max(1, work.parts * dv * 4))
    if m <= step or at is not None:
        where = (at, window)
        return launch(query, entries, keys, values, scaling, softcap, sinks, live, *where, work)
    slices = []
    for start in range(0, m, step):
        stop = min(start + step, m)
        upto = n - m + stop
        part = _Work.of(prefix, query.dtype, B, H, Hq // H * (stop - start), upto)
        seen = None if live is None else live[:, :upto]
        now = (query[:, :, start:stop], entries, keys[:, :, :upto], values[:, :, :upto])
        slices.append(launch(*now, scaling, softcap, sinks, seen, None, 0, part))
    return torch.cat(slices, dim=1)


@dataclass(frozen=True)
class _Work:
    """How a call is split up: `gm` query rows for each KV head of each sequence.

    rows, live_rows      rows per block, for the prefix and for the live tokens
    blocks, live_blocks  blocks per tile, likewise
    base                 index of the first live tile's first result, after the prefix's results
    parts                number of results, of `dv` numbers each
    """

    plan: Plan
    rows: int
    blocks: int
    live_rows: int
    live_blocks: int
    live_tile: int
    live_tiles: int
    base: int
    parts: int

    @classmethod
    def of(
        cls,
        prefix: Prefix,
        dtype: torch.dtype,
        B: int,
        H: int,
        gm: int,
        n: int,
    ) -> _Work:
        entries = prefix.entries
        contexts = len(entries.lengths) // H
        packed = PACKED_ROWS if any(FORMS[entries.store].bits) else 16
        rows = _rows(gm * -(-B // contexts), dtype, packed)
        blocks = -(-gm * -(-B // contexts) // rows)
        most = DECODE_TILE if blocks <= 2 else 1 << 30
        plan = plan_of(prefix, B, tile_size(sum(entries.lengths), blocks, most))
        live_rows = _rows(gm, dtype)
        live_blocks = -(-gm // live_rows)
        live_tile = tile_size(B * H * n, live_blocks)
        live_tiles = -(-n // live_tile)
        base = plan.slots * gm
        return cls(
            plan=plan,
            rows=rows,
            blocks=-(-plan.most * gm // rows),
            live_rows=live_rows,
            live_blocks=live_blocks,
            live_tile=live_tile,
            live_tiles=live_tiles,
            base=base,
            parts=base + B * H * live_tiles * gm,
        )


def launch(
    query: torch.Tensor,
    entries: Entries,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    live: torch.Tensor | None,
    at: torch.Tensor | None,
    window: int,
    work: _Work,
) -> torch.Tensor:
    """`attend_prefix` for queries whose results fit into memory at once."""
    B, Hq, m, d = query.shape
    H, n, dv = values.shape[1:]
    gm = Hq // H * m
    query, keys, values = query.contiguous(), _rows_packed(keys), _rows_packed(values)
    if live is not None and live.stride(1) != 1:
        live = live.contiguous()
    asking, ask_scaling = query, scaling
    if entries.rotated:
        signs, factor = _turn(d, query.dtype, query.device)
        asking, ask_scaling = query @ signs, scaling * factor
    form, stored = FORMS[entries.store], operands(entries)
    parts = query.new_empty(work.parts * (dv + 1), dtype=torch.float32)
    out = query.new_empty(B, m, Hq, dv)
    turned = torch.empty_like(out) if entries.values.rotated else None
    prefix_programs = work.plan.tiles.shape[0] * work.blocks
    programs = prefix_programs + B * H * work.live_tiles * work.live_blocks
    shapes = _shapes(d, dv, form, query.element_size(), work.rows, work.live_rows)
    device.partial[(programs,)](
        query,
        asking,
        stored.keys,
        stored.key_scale,
        stored.key_zero,
        stored.values,
        stored.value_scale,
        entries.beta,
        keys,
        values,
        live,
        at,
        work.plan.tiles,
        work.plan.order,
        parts,
        work.parts,
        prefix_programs,
        work.blocks,
        work.live_blocks,
        work.live_tiles,
        work.live_tile,
        work.base,
        scaling,
        ask_scaling,
        softcap or 1.0,
        m,
        gm,
        n,
        H,
        *keys.stride()[:2],
        *values.stride()[:2],
        0 if live is None else live.stride(0),
        window,
        form.kind,
        entries.beta is not None,
        live is not None,
        at is not None,
        softcap is not None,
        work.rows,
        work.live_rows,
        **shapes,
    )
    few = B * Hq * m <= FEW_ROWS
    columns = min(32, _power(dv)) if few else _power(dv)
    device.reduce[(B * Hq * m, -(-dv // columns))](
        parts,
        work.parts,
        work.plan.heads,
        work.plan.rows,
        sinks,
        out,
        turned,
        work.live_tiles,
        work.base,
        m,
        gm,
        H,
        Hq,
        sinks is not None,
        turned is not None,
        CHUNK=64 if few else 16,
        DV=dv,
        COLUMNS=columns,
        num_warps=4,
    )
    if turned is None:
        return out
    # What all tiles of the prefix gave, in one product instead of one for each.
    signs, factor = _turn(dv, out.dtype, out.device)
    back = torch.addmm(out.view(-1, dv), turned.view(-1, dv), signs, alpha=factor)
    return back.view(out.shape)


def _rows(rows: int, dtype: torch.dtype, few: int = 16) -> int:
    """Rows of a block: the least a matrix unit takes, up to `few` in all, or 64. Float32 has no
    such unit, and more rows would not fit its registers."""
    return 16 if rows <= few or dtype == torch.float32 else 64


def _power(x: int) -> int:
    return max(16, 1 << (x - 1).bit_length())


def _rows_packed(x: torch.Tensor) -> torch.Tensor:
    """Live keys or values `[B, H, n, d]` whose tokens are `d` apart, as the kernel reads them."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


@cache
def _shapes(
    d: int, dv: int, form: Form, itemsize: int, rows: int, live_rows: int
) -> dict[str, Any]:
    """Shapes the kernel is compiled for; see `device` for what the columns mean."""
    names = ("D", "BLOCK", "WIDE", "BLOCKS"), ("DV", "VBLOCK", "VWIDE", "VBLOCKS")
    found: dict[str, Any] = {}
    for dim, keys in zip((d, dv), names, strict=True):
        block = form.block(dim)
        blocks = 1 << (dim // block - 1).bit_length()
        wide = max(1 << (block - 1).bit_length(), 64 // blocks)  # quarters of 16 columns at least
        found.update(zip(keys, (dim, block, wide, blocks), strict=True))
    found.update(BITS=form.bits[0], VBITS=form.bits[1], UNIT=0, VUNIT=0)
    if any(form.bits):
        of_keys = key_words(d, form.bits[0])
        of_values = value_words(dv, form.bits[1])
        found.update(UNIT=of_keys.unit, WIDE=of_keys.wide)
        found.update(VUNIT=of_values.unit, VWIDE=of_values.wide, VBLOCKS=of_values.parts)
    a_key = (_power(d) + _power(dv)) * itemsize
    step = 64
    while step > 16 and step * a_key > _STEP_BYTES:
        step //= 2
    stages = 3 if _power(d) + _power(dv) <= 256 else 2  # with more, some GPUs lack the room
    # Steps of 64 keys of 8 bits by 64 rows, of 128 numbers each, came out as NaN on an H200: a
    # fault of the ptxas that comes with Triton 3.6, which CUDA's own does not have.
    a_step = min(step, 32) if any(form.bits) and rows == 64 else step
    found.update(
        LIVE_WIDE=_power(d), LIVE_VWIDE=_power(dv), KEYS=a_step, STAGES=stages, num_warps=4
    )
    # While decoding, live tokens are few; their buffers must not stop programs that read the
    # prefix from sharing a multiprocessor.
    few = live_rows == 16
    found.update(LIVE_KEYS=max(16, step // 2) if few else step, LIVE_STAGES=2 if few else stages)
    return found


@cache
def _turn(d: int, dtype: torch.dtype, where: torch.device) -> tuple[torch.Tensor, float]:
    """`hadamard` as `x @ signs * factor`: `signs [d, d]` are 0 and +-2^-k, exact in any dtype."""
    n = d & -d
    k = (n.bit_length() - 1) // 2
    signs = hadamard(torch.eye(d)).sign() * 2.0**-k
    return signs.to(where, dtype), 2.0**k * n**-0.5
