"""How many entries each head gets, and what they cost in bytes.

An allocation is `lengths[layer][head]`: ints that sum exactly to the total. Layers may differ
in head count, tokens and dimensions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from amcli.errors import UsageError
from amcli.matching.methods import SINKS

BETA_BYTES = 4
"""beta is float32, whatever the model's dtype."""

FLOOR_SHARE = 0.1
"""Share of the mean budget that every head keeps under adaptive budgets. Scores alone would give
almost everything to the few heads that look up facts, and starve those that prepare the query."""

FLOOR_LEAST = 4
"""Entries every head keeps at least: room for the sink and a little more."""

FLOOR_FIRST = 16
"""Entries that heads of the first layer keep at least. Their attention is spread over the whole
document, so no single key scores high, and what they lose is lost to every later layer."""

ADAKV_SHARE = 0.2
"""Share of a head's mean budget that AdaKV protects (kvpress; its paper: 0.5)."""

PYRAMID_DEPTH = 20
"""PyramidKV's last layer gets this many times less than the mean."""

NAMES = ("adaptive", "uniform", "adakv", "global", "pyramid")
"""Ways to share out entries; see `allocate`."""

Lengths = list[list[int]]


@dataclass(frozen=True)
class LayerShape:
    """One compacted layer: KV heads, tokens `T`, dims of a key and a value, bytes per number.

    packed       bytes of one entry's stored key and value, if not in the model's dtype
    group        entries of a head that share something stored besides; 0: none do
    group_bytes  what each begun group of a head costs
    """

    heads: int
    tokens: int
    key_dim: int
    value_dim: int
    itemsize: int
    packed: int | None = None
    group: int = 0
    group_bytes: int = 0

    @property
    def full_bytes(self) -> int:
        """Bytes of the layer's uncompacted keys and values."""
        return self.heads * self.tokens * (self.key_dim + self.value_dim) * self.itemsize

    def entry_bytes(self, beta: bool = True) -> int:
        """Bytes that one more stored entry costs, with its bias unless the method has none, where
        it begins no group."""
        numbers = (self.key_dim + self.value_dim) * self.itemsize
        return (numbers if self.packed is None else self.packed) + (BETA_BYTES if beta else 0)

    def stored_bytes(self, lengths: Sequence[int], beta: bool = True) -> int:
        """Bytes of heads with these numbers of entries, biases and groups included."""
        groups = sum(-(-t // self.group) for t in lengths) if self.group else 0
        return sum(lengths) * self.entry_bytes(beta) + groups * self.group_bytes


def allocate(
    name: str, total: int, layers: Sequence[LayerShape], scores: Sequence[torch.Tensor]
) -> Lengths:
    """`total` entries shared out by the budget of that name.

    `adaptive`: over all layers and heads by score, with a floor that keeps every head working;
    `global`: the same with no floor but SINKS entries; `adakv`: by score within each layer;
    `uniform` and `pyramid` ignore scores. `scores`: per layer `[H, T]`.

    Raises ValueError for an unknown name, and where `uniform` does.
    """
    if name == "uniform":
        return uniform(total, layers)
    if name == "pyramid":
        return pyramid(total, layers)
    if name == "adakv":
        return adakv(scores, total, layers)
    if name == "global":
        return adaptive(scores, total, floor=SINKS)
    if name == "adaptive":
        return adaptive(scores, total)
    raise ValueError(f"unknown budget {name!r}")


def unscored(name: str, total: int, layers: Sequence[LayerShape]) -> Lengths:
    """What the budget of that name gives before scores are known: where they decide, the same to
    all heads.

    For methods whose scores need to know the budget, which itself depends on the scores.
    """
    return pyramid(total, layers) if name == "pyramid" else uniform(total, layers)


def uniform(total: int, layers: Sequence[LayerShape]) -> Lengths:
    """The same for every head, at most `T` each; a remainder goes to the first heads, one each.

    Raises ValueError when `total` is negative or more than there are tokens.
    """
    ceilings = [layer.tokens for layer in layers for _ in range(layer.heads)]
    _check_total(total, sum(ceilings))
    lengths = [0] * len(ceilings)
    left = total
    while left:  # raise the level until a head is full or the rest does not divide evenly
        room = [i for i, t in enumerate(lengths) if t < ceilings[i]]
        share = min(left // len(room), min(ceilings[i] - lengths[i] for i in room))
        for i in room if share else room[:left]:
            lengths[i] += share or 1
            left -= share or 1
    return _by_layer(lengths, [layer.heads for layer in layers])


def adaptive(scores: Sequence[torch.Tensor], total: int, floor: int | None = None) -> Lengths:
    """One global top-k over the scores of all layers and heads, after a floor for each head.

    `scores`: per layer `[H, T]`, comparable across layers and heads (a softmax probability).
    Each head first gets its own best `min(floor, T)` keys (fewer when `total` is less than the
    floors); the rest goes to the best remaining scores anywhere. The floor is FLOOR_SHARE of the
    mean budget, at least FLOOR_LEAST (FLOOR_FIRST in the first layer), unless given. Ties go to
    the lower layer, then the lower head. Raises ValueError where `uniform` does.
    """
    _check_total(total, sum(s.numel() for s in scores))
    heads = sum(s.shape[0] for s in scores)
    if heads == 0:
        return [[] for _ in scores]
    share = int(FLOOR_SHARE * total / heads)
    floors = [max(FLOOR_LEAST, share) if floor is None else floor] * len(scores)
    if floor is None:
        floors[0] = max(FLOOR_FIRST, share)
    floors = [min(f, total // heads) for f in floors]
    lengths: list[int] = []
    pool: list[torch.Tensor] = []
    owner: list[torch.Tensor] = []
    for layer, least in zip(scores, floors, strict=True):
        H, T = layer.shape
        kept = min(least, T)
        ranked = layer.detach().float().sort(dim=1, descending=True).values[:, kept:]
        pool.append(ranked.reshape(-1).to(scores[0].device))
        of = torch.arange(len(lengths), len(lengths) + H, device=scores[0].device)
        owner.append(of.repeat_interleave(T - kept))
        lengths += [kept] * H
    order = torch.cat(pool).sort(descending=True, stable=True).indices[: total - sum(lengths)]
    more = torch.bincount(torch.cat(owner)[order], minlength=heads).tolist()
    return _by_layer(
        [a + b for a, b in zip(lengths, more, strict=True)], [s.shape[0] for s in scores]
    )


def adakv(scores: Sequence[torch.Tensor], total: int, layers: Sequence[LayerShape]) -> Lengths:
    """AdaKV: every layer gets its uniform share; within a layer, one top-k over all heads' scores.

    Each head first gets its own best ADAKV_SHARE of the layer's mean. Feng et al., arXiv
    2407.11550. Raises ValueError where `uniform` does.
    """
    lengths = []
    for layer, heads in zip(scores, uniform(total, layers), strict=True):
        floor = int(ADAKV_SHARE * sum(heads) / max(1, len(heads)))
        lengths += adaptive([layer], sum(heads), floor=floor)
    return lengths


def pyramid(total: int, layers: Sequence[LayerShape]) -> Lengths:
    """PyramidKV: layers fall linearly from nearly twice the mean to 1/PYRAMID_DEPTH of it.

    Cai et al., arXiv 2406.02069. If the first layer would get more than it has tokens, it keeps
    them all and the slope is flatter. Within a layer heads get the same; a remainder goes to the
    first heads, one each. Raises ValueError where `uniform` does.
    """
    ceilings = [layer.heads * layer.tokens for layer in layers]
    _check_total(total, sum(ceilings))
    count = len(layers)
    if not total:
        return [[0] * layer.heads for layer in layers]
    mean = total / sum(ceilings)  # as a share of each layer's keys, since layers may differ in size
    last = max(mean / PYRAMID_DEPTH, 2 * mean - 1)
    slope = [1 - 2 * i / (count - 1) if count > 1 else 0.0 for i in range(count)]
    shares = [c * (mean + (mean - last) * x) for c, x in zip(ceilings, slope, strict=True)]
    parts = _round(shares, total, ceilings)
    return [uniform(part, [layer])[0] for part, layer in zip(parts, layers, strict=True)]


def _round(shares: Sequence[float], total: int, ceilings: Sequence[int]) -> list[int]:
    """Whole numbers near `shares` that sum to `total`, none above its ceiling."""
    parts = [min(int(share), ceiling) for share, ceiling in zip(shares, ceilings, strict=True)]
    left = total - sum(parts)
    while left:  # with layers of different sizes, the shares need not sum to the total
        for i in sorted(range(len(parts)), key=lambda i: parts[i] - shares[i]):
            step = 1 if left > 0 else -1
            if left and 0 <= parts[i] + step <= ceilings[i]:
                parts[i] += step
                left -= step
    return parts


def stored_bytes(lengths: Lengths, layers: Sequence[LayerShape], beta: bool = True) -> int:
    """Bytes that an allocation stores, biases included."""
    return sum(layer.stored_bytes(t, beta) for t, layer in zip(lengths, layers, strict=True))


def entries_for_ratio(
    ratio: float,
    layers: Sequence[LayerShape],
    *,
    beta: bool = True,
    allocate: Callable[[int], Lengths] | None = None,
) -> int:
    """The largest total of entries whose stored bytes still give a ratio of at least `ratio`.

    If all entries cost the same, a division is enough. Where costs differ, or entries form groups,
    the bytes depend on who gets the entries: `allocate(total)` says who, and the total is found by
    bisection. The ratio is met whatever the allocation; one more entry would break it, and where
    the allocation is nested (no head loses by a larger total) so would any larger total. Without
    `allocate`, every entry counts as the most expensive one, and groups as with as many entries in
    every head. Raises UsageError for a ratio below 1 or one that leaves no entry.
    """
    if not ratio >= 1:
        raise UsageError(
            f"a ratio of {ratio:g} would not compact",
            "use a ratio of 1 or more",
            code="ratio-below-1",
            field="ratio",
            ratio=ratio,
        )
    full = sum(layer.full_bytes for layer in layers)
    capacity = sum(layer.heads * layer.tokens for layer in layers)
    limit = int(full / ratio * (1 + 1e-12))  # as floats, 1056 / 1.1 is a little less than 960
    if capacity == 0:
        raise UsageError("there is no key to compact", code="nothing-to-compact")
    entries = _entries_within(limit, capacity, layers, beta, allocate)
    if entries == 0:
        raise UsageError(
            f"a ratio of {ratio:g} leaves no entry of {capacity} keys",
            "use a smaller ratio",
            code="ratio-leaves-nothing",
            field="ratio",
            ratio=ratio,
            keys=capacity,
        )
    return entries


def _entries_within(
    limit: int,
    capacity: int,
    layers: Sequence[LayerShape],
    beta: bool,
    allocate: Callable[[int], Lengths] | None,
) -> int:
    """The most entries, up to `capacity`, that take at most `limit` bytes."""
    costs = [layer.entry_bytes(beta) for layer in layers]
    shares = [x.group_bytes / x.group if x.group else 0.0 for x in layers]
    if not any(shares) and (allocate is None or len(set(costs)) == 1):
        return min(capacity, limit // max(costs))
    if allocate is None:
        dearest = [replace(x, packed=max(costs) - BETA_BYTES * beta) for x in layers]
        return _entries_within(
            limit, capacity, dearest, beta, lambda total: uniform(total, dearest)
        )
    # Between all groups being full and every head having begun one more.
    per_entry = [cost + share for cost, share in zip(costs, shares, strict=True)]
    begun = sum(x.heads * (x.group_bytes - s) for x, s in zip(layers, shares, strict=True))
    low = min(capacity, max(0, int((limit - begun) / max(per_entry)) - 1))
    high = min(capacity, int(limit / min(per_entry)) + 1)
    totals = range(low + 1, high + 1)
    return low + bisect_right(
        totals, limit, key=lambda total: stored_bytes(allocate(total), layers, beta)
    )


def _check_total(total: int, capacity: int) -> None:
    if not 0 <= total <= capacity:
        raise ValueError(f"a budget of {total} entries for {capacity} keys")


def _by_layer(flat: list[int], heads: Sequence[int]) -> Lengths:
    """Cut one list over all heads into a list per layer."""
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in heads]
