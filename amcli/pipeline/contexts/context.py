"""A context: a document in a model's cache, full or compact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from amcli.entries.catalogue import NATIVE
from amcli.entries.ragged import Entries
from amcli.errors import AmkvError, UsageError
from amcli.models.cache import CompactCache
from amcli.models.loading import LoadedModel
from amcli.system.versions import tools


@dataclass
class Context:
    """A document in the cache of a loaded model.

    ids        `T` token ids; the document is `ids[document_start:document_end]`
    boundary   `in_user_turn`, `raw` or `turn_closed`: how a question has to be led in
    source     name, hash and size of the text, as in the manifest
    before     tokens that the cache holds ahead of `ids`, as a prefix that never changes
    """

    loaded: LoadedModel
    cache: CompactCache
    ids: list[int]
    document_start: int
    document_end: int
    boundary: str
    source: dict[str, Any]
    before: int = 0

    @property
    def T(self) -> int:
        """Logical length: tokens of the context as the model read them."""
        return len(self.ids)

    @property
    def document(self) -> list[int]:
        """Token ids of the document alone."""
        return self.ids[self.document_start : self.document_end]

    def no_room(self, purpose: str) -> UsageError:
        """The error that the model's positions end too soon after the context: `purpose` says for
        what, up to "a document of"."""
        limit = self.loaded.geometry.max_positions
        return UsageError(
            f"the model's {limit:,} positions leave no room {purpose} of {self.T:,} tokens",
            "shorten the document, or choose a model with a longer context",
            code="document-too-long",
            field="source",
            tokens=self.T,
            limit=limit,
        )

    def lead(self, question: str, think: bool = False) -> list[int]:
        """Token ids between the end of the context and the start of a question's answer."""
        chat = self.loaded.chat
        if self.boundary == "turn_closed":
            return chat.next_turn(question, think)
        return chat.first_turn(question, think)

    def manifest(self) -> dict[str, Any]:
        """What the manifests of prefill and compact artifacts have in common."""
        return {
            **self.loaded.fingerprint(),
            "source": self.source,
            "logical_length": self.T,
            "document_start": self.document_start,
            "document_end": self.document_end,
            "boundary": self.boundary,
            "tools": tools(),
        }


def dense(cache: CompactCache, layer: int) -> Entries:
    """A layer's live keys and values, from a cache of one sequence: a sliding layer's tail."""
    keys, values = cache.live(layer)
    return Entries.dense(keys[0], values[0])


def held(cache: CompactCache, layer: int) -> list[Entries]:
    """All that a layer holds, from a cache of one sequence: a prefix, live tokens, or both."""
    prefix = cache.attention[layer].prefix
    found = [] if prefix is None else [entries for entries, _ in prefix.contexts()]
    if not found or cache.live(layer)[0].shape[2]:
        found.append(dense(cache, layer))
    return found


def shared(context: Context, layers: Sequence[Entries] | None = None) -> CompactCache:
    """A cache with the entries of full layers as a prefix that all rows of a batch share.

    `layers` are the entries of all heads of every layer; None: what the context holds live.
    """
    cache = context.cache.fork()
    if context.before:  # it already has a prefix
        return cache
    if layers is not None:
        put(context, cache, layers)
    elif context.T:
        for i in full_layers(context):
            cache.set_prefix(i, dense(context.cache, i), context.T)
    return cache


def put(context: Context, cache: CompactCache, layers: Sequence[Entries]) -> None:
    """Puts the entries of all heads of every layer into a cache of the context, as they are stored:
    those of full layers as a prefix, those of sliding layers as numbers."""
    if not context.T:
        return
    full, loaded = set(full_layers(context)), context.loaded
    for i, heads in enumerate(layers):
        if i in full:
            cache.set_prefix(i, loaded.shard.mine(heads), context.T)
        elif heads.store != NATIVE:  # else they are what the cache holds
            set_tail(cache, i, loaded.shard.mine(heads), loaded.dtype, context.T)


def set_tail(cache: CompactCache, layer: int, heads: Entries, dtype: torch.dtype, T: int) -> None:
    """Puts the entries of a layer into a cache as live numbers of that dtype, as more tokens will
    follow, and those of a sliding layer leave at the other end."""
    numbers, H, n = heads.unpack().to(heads.device, dtype), len(heads.lengths), heads.lengths[0]
    keys = numbers.keys.stored().view(H, n, heads.key_dim)
    cache.set_live(layer, keys, numbers.values.stored().view(H, n, heads.value_dim), T)


def full_layers(context: Context) -> Sequence[int]:
    """Layers that can be compacted: those that see the whole document."""
    return context.loaded.geometry.full_layers


def live_keys(context: Context, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`K [H, T, d]`, `V [H, T, dv]` of a full layer not compacted yet; a sliding layer's tail."""
    keys, values = context.cache.live(layer)
    return keys[0], values[0]


def require_finite(context: Context) -> None:
    """Raises AmkvError naming the first layer whose keys, values or state are not all finite."""
    for layer in range(len(context.loaded.geometry.layers)):
        for name, tensor in zip(("keys", "values"), live_keys(context, layer), strict=True):
            _require_finite(f"layer {layer}", name, tensor)
    for (place, name), state in context.cache.get_states().items():
        _require_finite(f"layer {place} of the model", f"{name} state", state)


def _require_finite(layer: str, name: str, tensor: torch.Tensor) -> None:
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        raise AmkvError(
            f"{layer}: {wrong:,} of {tensor.numel():,} numbers of the {name} are infinite or no "
            "numbers",
            "prefill the document again with dtype='bfloat16' or 'float32'",
            code="numbers-not-finite",
            field="dtype",
        )
