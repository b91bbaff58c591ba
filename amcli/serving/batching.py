"""Batches over different contexts: one cache, each row of which continues from its own.

    cache, mask = batch_of([one, two, one])

The kernels and the attention function know of this only what `entries.prefix` says.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from amcli.entries.ragged import Entries
from amcli.models.cache import CompactCache
from amcli.models.layer import CompactLayer


@dataclass(frozen=True)
class BatchedPrefix:
    """Entries of several contexts in one flat buffer, and which of them each batch row sees.

    A `prefix.Prefix`, which documents the fields; rows of one context share its entries.
    Raises ValueError when a row names no context, or the heads do not divide into contexts.
    """

    entries: Entries
    kv_heads: int
    batch: tuple[int, ...]
    derived: dict[Hashable, Any] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        heads = len(self.entries.lengths)
        if self.kv_heads < 1 or heads == 0 or heads % self.kv_heads:
            raise ValueError(f"{heads} heads are not contexts of {self.kv_heads} heads each")
        if not self.batch or min(self.batch) < 0 or max(self.batch) >= heads // self.kv_heads:
            raise ValueError(f"rows {self.batch} of {heads // self.kv_heads} contexts")

    @classmethod
    def join(cls, parts: Sequence[Entries]) -> BatchedPrefix:
        """Row `b` sees `parts[b]`; the same object given twice is stored once.

        The parts are copied into one buffer. Raises ValueError unless all have the same store,
        number of heads, and key and value dimensions.
        """
        distinct = list({id(part): part for part in parts}.values())
        number = {id(part): p for p, part in enumerate(distinct)}
        if len({(len(part.lengths), part.kind) for part in distinct}) != 1:
            raise ValueError("a batch wants contexts of one model, stored in one way")
        rows = tuple(number[id(part)] for part in parts)
        return cls(Entries.cat(distinct), len(parts[0].lengths), rows)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries of each KV head, over all contexts."""
        flat, H = self.entries.lengths, self.kv_heads
        return tuple(sum(flat[h::H]) for h in range(H))

    @property
    def key_dim(self) -> int:
        """Numbers of a key."""
        return self.entries.key_dim

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""
        return self.entries.value_dim

    @property
    def nbytes(self) -> int:
        """Bytes of the entries of all contexts."""
        return self.entries.nbytes

    def contexts(self) -> Iterator[tuple[Entries, list[int]]]:
        """Each context that some row sees: views of its entries, and those rows."""
        H = self.kv_heads
        for p in sorted(set(self.batch)):
            seen_by = [b for b, context in enumerate(self.batch) if context == p]
            yield self.entries.of_heads(p * H, (p + 1) * H), seen_by

    def select(self, rows: Sequence[int]) -> BatchedPrefix:
        """A batch of rows of this one, in that order; the entries are shared."""
        return BatchedPrefix(self.entries, self.kv_heads, tuple(self.batch[b] for b in rows))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BatchedPrefix:
        """The same on another device; numbers, not codes, in `dtype`."""
        return BatchedPrefix(self.entries.to(device, dtype), self.kv_heads, self.batch)


def batch_of(caches: Sequence[CompactCache]) -> tuple[CompactCache, torch.Tensor]:
    """A cache whose row `b` continues from the context in `caches[b]`, and its mask `[B, L]`.

    Each cache holds a compact context and nothing after it; one given twice is stored once. `L`
    is the longest logical length. The mask, int64, is that of a batch padded on the left: append
    the mask of the new tokens, and positions are its cumulative sum minus one, as in `generate`.
    Raises ValueError for caches of different models, with live tokens or sliding windows, with
    entries in different stores, or with keys rotated for different lengths.
    """
    turned = {cache.geometry.turned_for for cache in caches}
    plain = [replace(cache.geometry, turned_for=None) for cache in caches]
    if not plain or any(geometry != plain[0] for geometry in plain):
        raise ValueError("a batch wants caches of one model")
    if len(turned) > 1:
        raise ValueError(
            "RoPE that depends on the length turns these contexts by different frequencies"
        )
    if caches[0].states:
        raise ValueError("layers that keep a state cannot be batched over different contexts")
    lengths = [cache.get_seq_length() for cache in caches]
    prefixes = [_joined(layers) for layers in zip(*(x.attention for x in caches), strict=True)]
    joined = CompactCache.empty(caches[0].geometry)
    for i, prefix in enumerate(prefixes):
        joined.set_prefix(i, prefix, max(lengths))
    device = prefixes[0].entries.device if prefixes else None
    places = torch.arange(max(lengths), device=device)
    mask = places >= max(lengths) - torch.tensor(lengths, device=device)[:, None]
    return joined, mask.long()


def _joined(layers: Sequence[CompactLayer]) -> BatchedPrefix:
    """One layer's prefix, in which batch row `b` sees the prefix of `layers[b]`.

    Raises ValueError for a layer with live tokens, without a prefix of one context, or with a
    sliding window.
    """
    index = layers[0].index
    if layers[0].is_sliding:
        raise ValueError(
            f"layer {index} has a sliding window, and what it holds cannot be batched "
            "over different contexts"
        )
    parts: list[Entries] = []
    for layer in layers:
        prefix = layer.prefix
        if prefix is None or prefix.batch is not None or layer.live()[0].shape[2]:
            raise ValueError(
                f"layer {index}: only caches that hold a compact context and no token "
                "after it can be batched"
            )
        parts.append(prefix.entries)
    return BatchedPrefix.join(parts)
