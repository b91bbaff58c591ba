"""One layer of the compact cache: an optional compact prefix, then live tokens.

A layer has two lengths. Its *logical* length counts tokens as the model saw them and sets
positions; what it *stores* is the prefix's ragged entries plus the live tokens it still needs.
Knows transformers' cache protocol (5.17 and later) and nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from amcli.entries.prefix import Prefix
from amcli.models.geometry import LayerGeometry
from amcli.models.state import selected

LINK = "_amkv_layer"
"""Attribute on the returned keys by which the attention function finds the layer."""

_MIN_CAPACITY = 64

After = Callable[[torch.Tensor | None], None]
"""Called after the attention with the log of each query's softmax denominator `[B, Hq, m]`, or
None if that is not known."""

Observer = Callable[[int, torch.Tensor, "CompactLayer", float | None, float | None], After | None]
"""`callback(layer index, query [B, Hq, m, d] post-RoPE, layer, scaling, softcap)`, called before
the attention; what it returns is called after the attention."""


def crop_target(length: int, tokens: int) -> int:
    """The length that transformers' `crop(tokens)` asks for, in either of its two meanings."""
    return length + tokens if tokens <= 0 else min(tokens, length)


class CompactLayer(CacheLayerMixin):
    """One layer: `prefix` stands for the first `prefix_length` tokens, live tokens follow.

    Live keys and values sit in buffers that grow by doubling; columns `[0, end)` are in use and
    hold the newest `end` of `length` logical tokens. A full layer holds every token after the
    prefix. A sliding layer has no prefix and may forget what its window can no longer reach.

    While a step is captured (`decoding`), `at` says where on the device the columns of its tokens
    are kept, `[m]` int64; lengths then stay as they are until `advance`.
    """

    supports_early_init = False  # geometry is known, dtype and device come with the first token

    def __init__(
        self, geometry: LayerGeometry, index: int, observers: list[Observer] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.geometry = geometry
        self.is_sliding = geometry.window is not None
        self.is_croppable = not self.is_sliding  # a sliding layer forgets what it would need
        self.index = index
        self.observers: list[Observer] = [] if observers is None else observers
        self.prefix: Prefix | None = None
        self.prefix_length = 0
        self.length = 0
        self.pending = False  # updated, but not yet seen by the attention function
        self.at: torch.Tensor | None = None
        self.horizon: int | None = None  # tokens that the model would see, where that is ignored
        self._end = 0
        self._drop_buffers()

    def reset(self) -> None:
        """Forget everything, prefix included."""
        self.prefix = None
        self.prefix_length = self.length = 0
        self.pending = False
        self._drop_buffers()

    # ---- what transformers calls -------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers for tokens like these: `[B, H, m, d]`, `[B, H, m, dv]`."""
        self._reserve(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, H, m, d]` and `[B, H, m, dv]`; return what the new queries may see.

        The returned keys carry this layer, which makes the attention function add the prefix.
        Stored rows go on in a multiple of them, see `widen`. Raises ValueError when they cannot,
        and when dtype or device differ from what is stored.
        """
        m = key_states.shape[2]
        if self.at is not None:
            self._keys.index_copy_(2, self.at, key_states)
            self._values.index_copy_(2, self.at, value_states)
            return self._linked(*self.room())
        self.widen(key_states.shape[0])
        self._reserve(key_states, value_states)
        self._keys[:, :, self._end : self._end + m] = key_states
        self._values[:, :, self._end : self._end + m] = value_states
        self._end += m
        self.length += m
        return self._linked(*self._recent(m))

    def _linked(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.pending = True
        setattr(keys, LINK, self)
        return keys, values

    def get_seq_length(self) -> int:
        """Logical length: tokens the model has seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(live columns that `query_length` new tokens will see, logical position of the first)."""
        past = self._end if self.geometry.window is None else self._reach(self._end)
        return past + query_length, self.length - past

    def get_max_length(self) -> int:
        """The window, or -1: no limit."""
        return -1 if self.geometry.window is None else self.geometry.window

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: take back that many tokens. Positive (transformers 5.17): keep that many."""
        target = crop_target(self.length, tokens_to_remove)
        if target < self.length:
            self.truncate(target)

    def widen(self, batch: int) -> None:
        """Let each stored row go on in `batch / rows` rows, side by side, as `generate` asks for
        beams and several sequences. Nothing is copied before the next token is appended; a number
        that is no multiple changes nothing."""
        rows = self.rows
        if rows is not None and rows < batch and batch % rows == 0:
            self.batch_repeat_interleave(batch // rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the batch rows `beam_idx`; a prefix common to all rows stays."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows `indices`, of which a single row has any number."""
        if self.prefix is not None and self.prefix.batch is not None:
            self.prefix = self.prefix.select(indices.tolist())
        if self.is_initialized:
            self._replace_rows(lambda tensor: selected(tensor, indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        if self.prefix is not None and self.prefix.batch is not None:
            rows = range(len(self.prefix.batch))
            self.prefix = self.prefix.select([row for row in rows for _ in range(repeats)])
        if self.is_initialized and self._keys.shape[0] == 1:
            shape = (repeats, -1, -1, -1)
            self.set_buffers(
                self._keys.expand(shape), self._values.expand(shape), shared=True, end=self._end
            )
        elif self.is_initialized:
            self._replace_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    # ---- what the attention function and the pipeline call -------------------------------------

    def attended(
        self, query: torch.Tensor, scaling: float | None, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, list[After]]:
        """Show `query [B, Hq, m, d]` to the observers; return the keys and values it sees, and what
        to call with its mass."""
        self.pending = False
        told = [see(self.index, query, self, scaling, softcap) for see in tuple(self.observers)]
        seen = self._recent(query.shape[2]) if self.at is None else self.room()
        return *seen, [after for after in told if after is not None]

    def live(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Live tokens `[B, H, n, d]`, `[B, H, n, dv]`: views, do not write.

        A full layer: all tokens after the prefix. A sliding layer: the newest `window - 1` at
        most, what the next token can see. Float32 on the CPU while nothing is stored.
        """
        if not self.is_initialized:
            shape = (1, self.geometry.kv_heads, 0)
            return (
                torch.empty(*shape, self.geometry.key_dim),
                torch.empty(*shape, self.geometry.value_dim),
            )
        return self._recent(0)

    def set_prefix(self, prefix: Prefix, logical_length: int) -> None:
        """Let `prefix` stand for the first `logical_length` tokens; codes stay codes.

        Live tokens it covers are dropped and their memory freed; later ones stay. On an empty
        layer the logical length becomes `logical_length`. Raises ValueError for a sliding layer,
        for shapes that are not this layer's, and when tokens between the two would be lost.
        """
        shape = self.geometry
        if self.is_sliding:
            raise ValueError(f"layer {self.index} has a sliding window and takes no prefix")
        if len(prefix.lengths) != shape.kv_heads or (
            (prefix.key_dim, prefix.value_dim) != (shape.key_dim, shape.value_dim)
        ):
            raise ValueError(
                f"layer {self.index} has {shape.kv_heads} heads of {shape.key_dim} and "
                f"{shape.value_dim}, the prefix {len(prefix.lengths)} of {prefix.key_dim} "
                f"and {prefix.value_dim}"
            )
        later = max(0, self.length - logical_length)
        if later > self._end or (self._end and logical_length > self.length):
            raise ValueError(
                f"layer {self.index} holds tokens {self.length - self._end} to {self.length}, "
                f"a prefix of {logical_length} tokens does not join them"
            )
        if later == 0:
            self._drop_buffers()
        elif later < self._end:
            keys, values = self._recent(later, at_most=later)
            self.set_buffers(keys.clone(), values.clone(), shared=False)
        self.prefix = prefix
        self.prefix_length = logical_length
        self.length = max(self.length, logical_length)

    def set_live(self, keys: torch.Tensor, values: torch.Tensor, logical_length: int) -> None:
        """Replace the live tokens by `keys [H, n, d]`, `values [H, n, dv]` (never written to).

        A full layer needs every token after its prefix, a sliding one at least the newest
        `min(window - 1, logical_length)`. Raises ValueError otherwise.
        """
        H, n, d = keys.shape
        shape = self.geometry
        if (H, d, values.shape) != (shape.kv_heads, shape.key_dim, (H, n, shape.value_dim)):
            raise ValueError(
                f"layer {self.index} has {shape.kv_heads} heads of {shape.key_dim} and "
                f"{shape.value_dim}, got keys {tuple(keys.shape)}, values {tuple(values.shape)}"
            )
        wanted = self._needed(logical_length)
        if n < wanted or n > logical_length - self.prefix_length:
            raise ValueError(
                f"layer {self.index} at length {logical_length} wants {wanted} tokens, got {n}"
            )
        self.set_buffers(keys[None], values[None], shared=True)
        self.length = logical_length

    def can_truncate(self, logical_length: int) -> bool:
        """Whether the layer still holds what it needs at that shorter length."""
        if not self.prefix_length <= logical_length <= self.length:
            return False
        return self._end - (self.length - logical_length) >= self._needed(logical_length)

    def truncate(self, logical_length: int) -> None:
        """Drop live tokens back to a logical length; ValueError when they are not all there."""
        if not self.can_truncate(logical_length):
            raise ValueError(
                f"layer {self.index} cannot go back from {self.length} to {logical_length} tokens"
            )
        self._end -= self.length - logical_length
        self.length = logical_length
        self.pending = False

    def fork(self, batch: int, observers: list[Observer]) -> CompactLayer:
        """A layer with the same prefix and live tokens, `batch` rows; both copy before writing."""
        other = CompactLayer(self.geometry, self.index, observers)
        other.prefix, other.prefix_length = self.prefix, self.prefix_length
        other.length = self.length
        if self.is_initialized:
            rows = self._keys.shape[0]
            if rows not in (1, batch):
                raise ValueError(f"cannot fork {rows} sequences into {batch}")
            shape = (batch, -1, -1, -1)
            keys, values = self._keys.expand(shape), self._values.expand(shape)
            other.set_buffers(keys, values, shared=True, end=self._end)
            self._shared = True
        return other

    @property
    def rows(self) -> int | None:
        """Sequences in the batch; None where what is stored is common to any number of them."""
        if self.prefix is not None and self.prefix.batch is not None:
            return len(self.prefix.batch)
        return self._keys.shape[0] if self._end else None

    @property
    def nbytes(self) -> int:
        """Bytes of the prefix and of the live tokens in use (not of spare room in the buffers)."""
        total = 0 if self.prefix is None else self.prefix.nbytes
        if self.is_initialized:
            for tensor in (self._keys, self._values):
                total += tensor[:, :, : self._end].numel() * tensor.element_size()
        return total

    @property
    def end(self) -> int:
        """The column of the next token."""
        return self._end

    @property
    def capacity(self) -> int:
        """Tokens for which there is room before the buffers have to grow."""
        return self._keys.shape[2] if self.is_initialized else 0

    # ---- buffers -------------------------------------------------------------------------------

    def room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All columns, spare ones included: views."""
        keys, values = self._keys, self._values
        return keys.narrow(2, 0, keys.shape[2]), values.narrow(2, 0, values.shape[2])

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all columns, spare ones included; empty while nothing is stored."""
        return self._keys, self._values

    def hold(self, capacity: int) -> None:
        """Own buffers with that many columns; see `move`."""
        shape = self._keys.shape[0], self.geometry.kv_heads, capacity
        keys = self._keys.new_empty(*shape, self.geometry.key_dim)
        self.move(keys, self._values.new_empty(*shape, self.geometry.value_dim))

    def move(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Go on in these buffers, which become this layer's own; columns that are not in use are
        zero. Of a sliding layer, those that the next token cannot see are given up."""
        kept = self._reach(self._end)
        for new, old in zip((keys, values), self._recent(0, at_most=kept), strict=True):
            new[:, :, :kept] = old
            new[:, :, kept:] = 0
        self.set_buffers(keys, values, shared=False, end=kept)

    def holds(self, keys: torch.Tensor) -> bool:
        """Whether those are still the keys of this layer, and of no other."""
        return self._keys is keys and not self._shared

    def advance(self, tokens: int) -> None:
        """Count tokens that a captured step has put into the next columns."""
        self._end += tokens
        self.length += tokens

    def _needed(self, logical_length: int) -> int:
        """Live tokens that the layer needs to continue from `logical_length`."""
        if self.geometry.window is None:
            return logical_length - self.prefix_length
        return self._reach(logical_length)

    def _reach(self, tokens: int) -> int:
        window = self.geometry.window
        return tokens if window is None else min(tokens, window - 1)

    def _recent(self, m: int, at_most: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the columns the newest `m` tokens see, or of the newest `at_most`."""
        seen = m + self._reach(self._end - m) if at_most is None else at_most
        start = self._end - seen
        return self._keys.narrow(2, start, seen), self._values.narrow(2, start, seen)

    def _reserve(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make room for `keys [B, H, m, d]` after the columns in use, and own the buffers."""
        B, H, m, d = keys.shape
        if self._end:
            stored = (self._keys.shape[0], self._keys.dtype, self._keys.device)
            if stored != (B, keys.dtype, keys.device):
                raise ValueError(
                    f"layer {self.index} holds {stored[0]} sequences in {stored[1]} on {stored[2]},"
                    f" got {B} in {keys.dtype} on {keys.device}"
                )
        elif self.is_initialized and self._keys.shape[0] != B:
            self._drop_buffers()
        # Buffers made under inference_mode cannot be written to outside of it.
        frozen = self.is_initialized and self._keys.is_inference()
        writable = not self._shared and (not frozen or torch.is_inference_mode_enabled())
        if self.is_initialized and writable and self._end + m <= self._keys.shape[2]:
            return
        kept = self._reach(self._end)
        capacity = max(_MIN_CAPACITY, 2 * kept, kept + m)
        new_keys = keys.new_empty(B, H, capacity, d)
        new_values = values.new_empty(B, H, capacity, values.shape[3])
        if kept:
            old_keys, old_values = self._recent(0, at_most=kept)
            new_keys[:, :, :kept] = old_keys
            new_values[:, :, :kept] = old_values
        self.set_buffers(new_keys, new_values, shared=False, end=kept)

    def set_buffers(
        self, keys: torch.Tensor, values: torch.Tensor, shared: bool, end: int | None = None
    ) -> None:
        """Take these buffers, of which `end` columns are in use (None: all). The caller must not
        set the end later: an interrupt in between would make spare room count as tokens."""
        self._keys, self._values = keys, values
        self._end = keys.shape[2] if end is None else end
        self._shared = shared
        self.is_initialized = True

    def _drop_buffers(self) -> None:
        self._keys = self._values = torch.empty(0)
        self._end = 0
        self._shared = False
        self.is_initialized = False

    def _replace_rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.set_buffers(pick(self._keys), pick(self._values), shared=False, end=self._end)
