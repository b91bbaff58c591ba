"""Attention of new tokens over a compact prefix and the live tokens, in one softmax.

    out = softmax([softcap(q·C_k·scale) + beta,  softcap(q·k·scale) + mask,  sink]) [C_v; v; 0]

Knows torch and the ragged data structure; knows neither transformers nor caches. This module is
the definition, in plain PyTorch. Memory stays bounded: query rows are taken in tiles, and no step
holds more than about `seen.MAX_SCORES` scores. `attend` is also the one place that chooses: on CUDA
a prefix goes to the kernels of `amcli.kernels.attention` where they can take it.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from amcli.entries.matrix import hadamard
from amcli.entries.prefix import Prefix
from amcli.entries.ragged import Entries
from amcli.kernels import STATISTICS, cpu
from amcli.kernels.fused import Fused
from amcli.models.seen import Seen


def attend(
    query: torch.Tensor,
    prefix: Prefix | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    live: torch.Tensor | None = None,
    at: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the newest `m` tokens; returns `[B, m, Hq, dv]` in the dtype of `query`.

    query    `[B, Hq, m, d]`, post-RoPE; its rows are the last `m` of the `n` live tokens, or those
             `at` some columns
    prefix   entries that every query sees, shared by the batch; or those of each row of the batch;
             or None. Codes become numbers here only briefly, a few heads at a time
    keys     `[B, H, n, d]`, values `[B, H, n, dv]`; `Hq` is a multiple of `H`
    scaling  of `q·k`; `d ** -0.5` when None
    softcap  `s -> softcap * tanh(s / softcap)` on the scaled logit, before beta
    window   a query sees itself and the `window - 1` tokens before it; not with a prefix,
             whose entries have no position of their own
    sinks    `[Hq]`, one logit per head that takes mass and adds no value
    live     `[B, n]` bool, False where a live token is padding
    at       `[m]` int64 on the device: the columns of the `m` queries, in order; columns to the
             right of them are spare room. Shapes then say nothing about lengths, so that a step can
             be captured. Not together with `live`

    Scores and softmax are float32 (float64 for float64 inputs) wherever a prefix, a softcap or
    sinks are involved; otherwise PyTorch's own kernels run. Raises ValueError on shapes that do
    not fit together, and for a window with a prefix.
    """
    return attend_with_mass(
        query, prefix, keys, values, scaling=scaling, softcap=softcap, window=window,
        sinks=sinks, live=live, at=at,
    )[0]  # fmt: skip


def attend_with_mass(
    query: torch.Tensor,
    prefix: Prefix | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    live: torch.Tensor | None = None,
    at: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend`, and the log of each query's softmax denominator, `[B, Hq, m]` float32, if it comes
    for free with the output; else None."""
    B, Hq, m, d = query.shape
    H, n = keys.shape[1:3]
    if Hq % H or n < m:
        raise ValueError(f"{Hq} query heads, {H} KV heads, {m} queries, {n} live tokens")
    if prefix is not None and len(prefix.lengths) != H:
        raise ValueError(f"prefix has {len(prefix.lengths)} heads, the keys have {H}")
    if window is not None and window >= n:
        window = None
    if prefix is not None and window is not None:
        raise ValueError("a sliding window cannot be applied to a compact prefix")
    if prefix is not None and prefix.batch is not None and len(prefix.batch) != B:
        raise ValueError(f"a prefix for {len(prefix.batch)} rows, queries of {B}")
    if at is not None and live is not None:
        raise ValueError("columns known to the device only, and padding")
    scaling = d**-0.5 if scaling is None else scaling
    if query.is_cuda and (prefix is not None or at is not None):
        kept = _nothing(H, d, values.shape[3], query.device) if prefix is None else prefix
        found = by_kernels(
            query, kept, keys, values, scaling, softcap, sinks, live, at, window or n
        )
        if found is not None:
            return found, None
    if prefix is not None and prefix.batch is not None:
        out = query.new_empty(B, m, Hq, values.shape[-1])
        for entries, rows in prefix.contexts():
            out[rows] = attend(
                query[rows],
                entries,
                keys[rows],
                values[rows],
                scaling=scaling,
                softcap=softcap,
                sinks=sinks,
                live=None if live is None else live[rows],
                at=at,
            )
        return out, None
    seen = Seen(m, n, window, live, at)
    grouped = query.reshape(B, H, Hq // H, m, d)
    mass = None
    streamed = None
    if prefix is None and sinks is None:
        streamed = _streamed(grouped, keys, values, scaling, softcap, seen)
        if streamed is None and softcap is None:
            streamed = _in_halves(grouped, keys, values, scaling, seen)
    if streamed is not None:
        out, mass = streamed
    elif prefix is None and softcap is None and sinks is None:
        out = _stock(grouped, keys, values, scaling, seen)
    else:
        past = None if prefix is None else prefix.entries
        out = _explicit(grouped, past, keys, values, scaling, softcap, sinks, seen)
    # [B, H, g, m, dv] -> [B, m, Hq, dv]
    return out.permute(0, 3, 1, 2, 4).reshape(B, m, Hq, -1), mass


@cache
def _nothing(H: int, d: int, dv: int, where: torch.device) -> Entries:
    """A prefix without entries, for layers that have none: the kernels take it as any other."""
    keys, values = (torch.empty(0, dim, device=where, dtype=torch.float16) for dim in (d, dv))
    return Entries.of(keys, values, None, (0,) * H)


KERNELS = Fused("attention", "amcli.kernels.attention.launch")

_STREAM_PROGRAMS = 64
"""Blocks of 64 queries, over all heads, that keep a GPU busy with one program for each."""


def by_kernels(query: torch.Tensor, prefix: Prefix, *arguments: Any) -> torch.Tensor | None:
    """The kernels' result, or None where they are missing, decline or do not compile."""

    def run(kernels: ModuleType) -> torch.Tensor | None:
        if not kernels.can_attend(query, prefix):
            return None
        out: torch.Tensor = kernels.attend_prefix(query, prefix, *arguments)
        return out

    found: torch.Tensor | None = KERNELS.run(query, run)
    return found


def _streamed(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    softcap: float | None,
    seen: Seen,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Long chunks of queries in half precision, by the kernel that handles grouped heads, causal
    order and softcaps: `q [B, H, g, m, d]` -> `[B, H, g, m, dv]` and `[B, H * g, m]`.

    On an H200 it is faster than the kernels behind PyTorch's own function, which treats every
    query head as having its own keys. None where it does not pay, or cannot run.
    """
    B, H, g, m, d = q.shape
    half = q.dtype in (torch.float16, torch.bfloat16)
    few = -(-g * m // 64) * B * H < _STREAM_PROGRAMS
    if not (q.is_cuda and half) or few or not seen.plain:
        return None
    if torch.is_grad_enabled() and q.requires_grad:
        return None

    def run(kernels: ModuleType) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not kernels.can_take(q, keys, values):
            return None
        limit = torch.arange(seen.n - m + 1, seen.n + 1, device=q.device).repeat(g)
        rows = q.reshape(B * H, g * m, d)
        mass, out = kernels.row_stats(
            rows, keys.flatten(0, 1), values.flatten(0, 1), scaling, softcap, limit, None, q.dtype
        )
        return out.view(B, H, g, m, -1), mass.view(B, H * g, m)

    found: tuple[torch.Tensor, torch.Tensor] | None = STATISTICS.run(q, run)
    return found


def _in_halves(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, seen: Seen
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Several queries on a CPU, in two halves: the earlier tokens, which all of them see, and the
    queries' own tokens. Each half runs PyTorch's kernel without a mask, half as fast again as with.

    `q [B, H, g, m, d]` -> `[B, H, g, m, dv]` and `[B, H * g, m]`; None where it cannot run.
    """
    B, H, g, m, d = q.shape
    before = seen.n - m
    if m == 1 or not seen.plain:
        return None
    rows = q.reshape(B, H * g, m, d)
    if not cpu.can_take(rows, keys, values):
        return None
    own, own_values = (x[:, :, before:].repeat_interleave(g, 1) for x in (keys, values))
    out, mass = cpu.attention(rows, own, own_values, scaling, causal=True)
    if before:
        past, past_mass = cpu.attention(
            q.reshape(B, H, g * m, d), keys[:, :, :before], values[:, :, :before], scaling
        )
        past, past_mass = past.reshape(out.shape), past_mass.reshape(mass.shape)
        # Merge two softmaxes into one, each by its share of the mass.
        share = torch.sigmoid(past_mass - mass).unsqueeze(-1).to(out.dtype)
        out, mass = torch.lerp(out, past, share), torch.logaddexp(mass, past_mass)
    return out.reshape(B, H, g, m, -1), mass


def _stock(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, seen: Seen
) -> torch.Tensor:
    """PyTorch's fused attention: `q [B, H, g, m, d]` -> `[B, H, g, m, dv]`, keys not repeated."""
    B, H, g, m, d = q.shape
    # The half-precision flash kernels handle causal masks and grouped heads; any other combination
    # may fall back to a kernel that holds all scores, so it is tiled.
    if seen.plain and m > 1 and flash_takes(q, values):
        bias = causal_lower_right(m, seen.n)
        rows = q.reshape(B, H * g, m, d)
        out = scaled_dot_product_attention(
            rows, keys, values, attn_mask=bias, scale=scaling, enable_gqa=g > 1
        )
        return out.reshape(B, H, g, m, -1)
    out = q.new_empty(B, H, g, m, values.shape[-1])
    for tile in seen.tiles(q.device, B * H * g):
        rows = q[..., tile.rows, :].flatten(2, 3)  # [B, H, g * r, d]
        mask = seen.mask(tile, q.device)
        if mask is not None:
            mask = mask.repeat(1, g, 1)[:, None]  # [B or 1, 1, g * r, c]
        part = scaled_dot_product_attention(
            rows, keys[:, :, tile.columns], values[:, :, tile.columns], mask, scale=scaling
        )
        out[..., tile.rows, :] = part.view(B, H, g, -1, part.shape[-1])
    return out


def flash_takes(q: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether PyTorch's flash kernels take these queries `[..., d]` and values `[..., dv]`."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and q.shape[-1] == values.shape[-1] <= 256


def _explicit(
    q: torch.Tensor,
    prefix: Entries | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    seen: Seen,
) -> torch.Tensor:
    """Every term written out: `q [B, H, g, m, d]` -> `[B, H, g, m, dv]`.

    With a prefix the KV heads go one by one, because their lengths differ and padding them to the
    longest would cost more than they store; without one all heads go together.
    """
    B, H, g, m, _ = q.shape
    out = q.new_empty(B, H, g, m, values.shape[-1])
    sinks = None if sinks is None else sinks.reshape(H, g)
    if prefix is None:
        _softmax_heads(q, None, keys, values, None, False, scaling, softcap, sinks, seen, out)
        return out
    exact = torch.promote_types(q.dtype, torch.float32)
    turned = _turned(q.to(exact)) if prefix.rotated else None
    for h, entries in enumerate(prefix.heads()):
        head = slice(h, h + 1)
        sink = None if sinks is None else sinks[head]
        asking = None if turned is None else turned[:, head]
        parts = (q[:, head], asking, keys[:, head], values[:, head])
        back = prefix.values.rotated
        _softmax_heads(*parts, entries, back, scaling, softcap, sink, seen, out[:, head])
    return out


def _softmax_heads(
    q: torch.Tensor,
    turned: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
    back: bool,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    seen: Seen,
    out: torch.Tensor,
) -> None:
    """Fill `out [B, h, g, m, dv]` for `h` KV heads; `entries` are given only when `h` is 1.

    `turned`: queries for the entries' keys, shaped as `q`, where those need transformed queries.
    `back`: whether the entries' values are transformed.
    """
    B, h, g, _, d = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    keys, values = keys.to(exact), values.to(exact)  # [B, h, n, d], [B, h, n, dv]
    C_k, C_v, beta = entries if entries is not None else (keys.new_empty(0, d), None, None)
    t = C_k.shape[0]
    C_k = C_k.to(exact)  # [t, d]
    C_v = values.new_empty(0, values.shape[-1]) if C_v is None else C_v.to(exact)  # [t, dv]
    for tile in seen.tiles(q.device, B * h * g, extra_columns=t):
        rows = q[..., tile.rows, :].flatten(2, 3).to(exact) * scaling  # [B, h, g * r, d]
        asking = rows
        if turned is not None:
            asking = turned[..., tile.rows, :].flatten(2, 3).to(exact) * scaling
        now = _cap(rows @ keys[:, :, tile.columns].mT, softcap)  # [B, h, g * r, c]
        mask = seen.mask(tile, q.device)
        if mask is not None:
            now.view(B, h, g, -1, now.shape[-1]).masked_fill_(~mask[:, None, None], -torch.inf)
        past = _cap(asking.flatten(0, 2) @ C_k.T, softcap).view(*rows.shape[:3], t)
        if beta is not None:
            past += beta
        # One softmax over both, in place: on a CPU fresh memory costs more than the arithmetic.
        # The subtracted maximum is a constant to gradients: no gradient needs what is overwritten.
        top = now.detach().amax(-1, keepdim=True)  # [B, h, g * r, 1]
        if t:
            top = torch.maximum(top, past.detach().amax(-1, keepdim=True))
        if sinks is not None:
            per_row = sinks.to(exact).repeat_interleave(rows.shape[2] // g, dim=1)[None, ..., None]
            top = torch.maximum(top, per_row.detach())
        now, past = now.sub_(top).exp_(), past.sub_(top).exp_()
        total = now.sum(-1, keepdim=True) + past.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (per_row - top).exp()
        part = now @ values[:, :, tile.columns]
        of_past = past.flatten(0, 2) @ C_v
        part += (_turned(of_past) if back else of_past).view(part.shape)
        part = part / total
        out[..., tile.rows, :] = part.view(B, h, g, -1, part.shape[-1]).to(out.dtype)


def _turned(q: torch.Tensor) -> torch.Tensor:
    """`hadamard`, with gradients if they are asked for; `hadamard` itself has none."""
    if q.requires_grad and torch.is_grad_enabled():
        return q @ hadamard(torch.eye(q.shape[-1], dtype=q.dtype, device=q.device))
    return hadamard(q)


def _cap(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
