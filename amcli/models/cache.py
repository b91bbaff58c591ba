"""The cache a model runs on: one `CompactLayer` a layer, and what concerns all of them.

Guards the link to the attention function, forks, truncates, and lets others observe queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache

from amcli.batched import BatchedPrefix, device_of
from amcli.errors import ModelMismatchError
from amcli.models.geometry import ModelGeometry
from amcli.models.layer import CompactLayer, Observer, crop_target
from amcli.quantize import Entries


class CompactCache(Cache):
    """A cache for a model of known geometry; always truthy, and `len` counts layers.

    Make one with `CompactCache.empty`, then either run the model on it, or load it with
    `set_prefix` and `set_live`. It may be passed to `model.generate` together with the ids of the
    whole sequence, the document's included.
    """

    layers: list[CompactLayer]  # type: ignore[assignment]

    def __init__(self, geometry: ModelGeometry, layers: list[CompactLayer]) -> None:
        super().__init__(layers=list(layers))
        self.geometry = geometry
        self._observers: list[Observer] = []
        for layer in layers:
            layer.observers = self._observers
        self._newest: CompactLayer | None = None

    @classmethod
    def empty(cls, geometry: ModelGeometry) -> CompactCache:
        """A cache that holds nothing yet."""
        return cls(geometry, [CompactLayer(layer, i) for i, layer in enumerate(geometry.layers)])

    @classmethod
    def batch(cls, caches: Sequence[CompactCache]) -> tuple[CompactCache, torch.Tensor]:
        """A cache whose row `b` goes on from the context in `caches[b]`, and its mask `[B, L]`.

        Each of the caches holds a compact context and nothing after it; one that is given twice
        is stored once. `L` is the longest logical length, and the mask, int64, is that of a batch
        padded on the left: append that of the new tokens to it, and positions are its cumulative
        sum less one, as `generate` has them. Raises ValueError for caches of different models,
        with live tokens or sliding windows, or with entries stored in different ways.
        """
        if not caches or any(cache.geometry != caches[0].geometry for cache in caches):
            raise ValueError("a batch wants caches of one model")
        lengths = [cache.get_seq_length() for cache in caches]
        joined = cls.empty(caches[0].geometry)
        for i, layer in enumerate(joined.layers):
            layer.join([cache.layers[i] for cache in caches], max(lengths))
        first = joined.layers[0].prefix
        device = device_of(first.entries) if isinstance(first, BatchedPrefix) else None
        places = torch.arange(max(lengths), device=device)
        mask = places >= max(lengths) - torch.tensor(lengths, device=device)[:, None]
        return joined, mask.long()

    def __bool__(self) -> bool:
        return True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to one layer; see `CompactLayer.update`. ModelMismatchError on a lost link."""
        self.require_attended()
        self._newest = self.layers[layer_idx]
        return self._newest.update(key_states, value_states)

    def require_attended(self) -> None:
        """Raise ModelMismatchError when the last update never reached the attention function."""
        if self._newest is not None and self._newest.pending:
            raise ModelMismatchError(
                f"layer {self._newest.index} stored keys that no amkv attention has read, "
                "so the compact context would be ignored",
                'load the model with attn_implementation="amkv"; after an interrupted forward '
                "pass, truncate() the cache first",
            )

    def set_prefix(self, layer: int, prefix: Entries, logical_length: int) -> None:
        """See `CompactLayer.set_prefix`."""
        self.layers[layer].set_prefix(prefix, logical_length)

    def set_live(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, logical_length: int
    ) -> None:
        """See `CompactLayer.set_live`."""
        self.layers[layer].set_live(keys, values, logical_length)

    def live(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CompactLayer.live`."""
        self.require_attended()
        return self.layers[layer].live()

    def fork(self, batch: int = 1) -> CompactCache:
        """A cache that goes its own way from here, with `batch` copies of the sequence.

        Prefixes are shared, live tokens are copied only when either cache appends.
        """
        self.require_attended()
        observers: list[Observer] = []
        return CompactCache(self.geometry, [layer.fork(batch, observers) for layer in self.layers])

    def truncate(self, logical_length: int) -> None:
        """Drop live tokens back to a logical length, at least the prefix's; all layers or none.

        Also mends the cache after an interrupted forward pass. Raises ValueError when a layer
        does not hold the tokens it would need: a sliding layer forgets its past.
        """
        for layer in self.layers:
            if not layer.can_truncate(logical_length):
                layer.truncate(logical_length)
        for layer in self.layers:
            layer.truncate(logical_length)
        self._newest = None

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: take back that many tokens. Positive (transformers 5.17): keep that many."""
        self.truncate(crop_target(self.get_seq_length(), tokens_to_remove))

    @contextmanager
    def observe(self, callback: Observer) -> Iterator[None]:
        """Call `callback` with every layer's queries before they attend, inside the block.

        It may change the layer (`set_prefix`); attention then uses the new state.
        """
        self._observers.append(callback)
        try:
            yield
        finally:
            self._observers.remove(callback)

    def nbytes(self) -> int:
        """Bytes of all prefixes and live tokens."""
        return sum(layer.nbytes for layer in self.layers)
