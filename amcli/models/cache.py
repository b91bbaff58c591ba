"""The cache a model runs on: a `CompactLayer` per attention layer, and what concerns all of them.

Guards the link to the attention function, forks, truncates, and lets others observe queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from amcli.entries.prefix import Prefix
from amcli.errors import ModelMismatchError
from amcli.models.geometry import ModelGeometry
from amcli.models.layer import CompactLayer, Observer, crop_target
from amcli.models.state import StateLayer


@dataclass(frozen=True)
class Mark:
    """A logical length, and the states at that length."""

    length: int
    states: dict[tuple[int, str], torch.Tensor]


class CompactCache(Cache):
    """A cache for a model of known geometry; always truthy, and `len` counts layers.

    Make one with `CompactCache.empty`, then either run the model on it, or load it with
    `set_prefix` and `set_live`. It may be passed to `model.generate` together with the ids of the
    whole sequence, the document's included.
    """

    layers: list[Any]
    """The model's layers as transformers counts them: `attention` and `states` in their places."""

    def __init__(
        self,
        geometry: ModelGeometry,
        layers: list[CompactLayer],
        states: Sequence[StateLayer] | None = None,
    ) -> None:
        self.attention = layers
        self.states = [StateLayer() for _ in geometry.states] if states is None else list(states)
        kept = dict(zip(geometry.states, self.states, strict=True))
        rest = iter(layers)
        places = range(len(layers) + len(kept))
        super().__init__(layers=[kept[i] if i in kept else next(rest) for i in places])
        self.geometry = geometry
        self._observers: list[Observer] = []
        for layer in layers:
            layer.observers = self._observers
        self._newest: CompactLayer | None = None
        self.step: Any = None
        """What decodes over the buffers that the layers have; see `decoding`."""

    @classmethod
    def empty(cls, geometry: ModelGeometry) -> CompactCache:
        """A cache that holds nothing yet."""
        return cls(geometry, [CompactLayer(layer, i) for i, layer in enumerate(geometry.layers)])

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
                code="attention-not-amkv",
                field="model",
            )

    def set_prefix(self, layer: int, prefix: Prefix, logical_length: int) -> None:
        """See `CompactLayer.set_prefix`."""
        self.attention[layer].set_prefix(prefix, logical_length)

    def set_live(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, logical_length: int
    ) -> None:
        """See `CompactLayer.set_live`."""
        self.attention[layer].set_live(keys, values, logical_length)

    def live(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CompactLayer.live`."""
        self.require_attended()
        return self.attention[layer].live()

    def fork(self, batch: int = 1) -> CompactCache:
        """A cache that continues independently from here, with `batch` copies of the sequence.

        Prefixes are shared, live tokens are copied only when either cache appends.
        """
        self.require_attended()
        observers: list[Observer] = []
        layers = [layer.fork(batch, observers) for layer in self.attention]
        return CompactCache(self.geometry, layers, [state.fork(batch) for state in self.states])

    def get_states(self) -> dict[tuple[int, str], torch.Tensor]:
        """Copies of all states, by the model's layer and the name of the state."""
        return {
            (place, name): tensor
            for place, state in zip(self.geometry.states, self.states, strict=True)
            for name, tensor in state.tensors().items()
        }

    def set_states(self, found: Mapping[tuple[int, str], torch.Tensor]) -> None:
        """Continue from states as `get_states` returns them."""
        for place, state in zip(self.geometry.states, self.states, strict=True):
            state.load({name: tensor for (layer, name), tensor in found.items() if layer == place})

    def mark(self) -> Mark:
        """Where the cache is now, to `rewind` to if the next reading is broken off."""
        return Mark(self.get_seq_length(), self.get_states())

    def rewind(self, mark: Mark) -> None:
        """Return to a mark. Raises ValueError, and changes nothing, when a sliding layer has
        forgotten what it saw then; after a single forward pass, none has."""
        self.rewind_attention(mark.length)
        self.set_states(mark.states)

    def truncate(self, logical_length: int) -> None:
        """Drop live tokens back to a logical length, at least the prefix's; all layers or none.

        Also repairs the cache after an interrupted forward pass. Raises ValueError when a layer
        does not hold the tokens it would need: a sliding layer forgets its past, and a state no
        longer has it.
        """
        if self.states and logical_length != self.get_seq_length():
            raise ValueError("layers that keep a state cannot go back")
        self.rewind_attention(logical_length)

    def rewind_attention(self, logical_length: int) -> None:
        """`truncate` for layers of attention alone: states stay as they are."""
        for layer in self.attention:
            if not layer.can_truncate(logical_length):
                layer.truncate(logical_length)
        for layer in self.attention:
            layer.truncate(logical_length)
        self._newest = None

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: take back that many tokens. Positive (transformers 5.17): keep that many."""
        self.truncate(crop_target(self.get_seq_length(), tokens_to_remove))

    @property
    def observed(self) -> bool:
        """Whether someone looks at queries."""
        return bool(self._observers)

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
        """Bytes of all prefixes, live tokens and states."""
        kept = sum(state.nbytes for state in self.states)
        return kept + sum(layer.nbytes for layer in self.attention)
