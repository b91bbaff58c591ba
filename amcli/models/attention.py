"""The attention function and the mask function that transformers calls by the name "amkv".

A model loaded with `attn_implementation="amkv"` runs unmodified modelling code. What it calls
here finds the cache layer through an attribute on the keys that `CompactLayer.update` returned,
shows the queries to observers, and attends over the layer's prefix and live tokens. Without
such a layer it is ordinary causal attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from amcli.errors import UsageError
from amcli.models.attend import attend_with_mass
from amcli.models.layer import LINK, After, CompactLayer

NAME = "amkv"

# Arguments of other attention functions that change the result and that this one cannot honour.
_UNSUPPORTED = ("position_bias", "indices", "block_indices", "sinks")


def register() -> None:
    """Make `attn_implementation="amkv"` known to transformers; safe to call again."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, live_mask)


@dataclass(frozen=True)
class Call:
    """One call of the attention function, as the probe sees it."""

    query_heads: int
    window: int | None
    device: torch.device


@dataclass
class Recording:
    """Calls in order, and every window that a mask was asked for."""

    calls: list[Call] = field(default_factory=list)
    mask_windows: set[int] = field(default_factory=set)


_recording: ContextVar[Recording | None] = ContextVar("amkv_recording", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the calls made inside the block."""
    record = Recording()
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)


_unpadded: ContextVar[bool] = ContextVar("amkv_unpadded", default=False)


@contextmanager
def unpadded() -> Iterator[None]:
    """Any mask inside the block is one that a model made by itself and hides nothing: it is not
    looked at, which would wait for the device."""
    token = _unpadded.set(True)
    try:
        yield
    finally:
        _unpadded.reset(token)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it; returns `([B, m, Hq, dv], None)`.

    `query [B, Hq, m, d]`, `key [B, H, n, d]` and `value [B, H, n, dv]` are the live tokens,
    `attention_mask` is what `live_mask` made. Raises NotImplementedError for what would silently
    change the result: dropout, 4-D masks, bidirectional attention, position biases.
    """
    _refuse(module, attention_mask, dropout, kwargs)
    record = _recording.get()
    if record is not None:
        record.calls.append(Call(query.shape[1], sliding_window, query.device))
    layer: CompactLayer | None = getattr(key, LINK, None)
    prefix = None
    afters: list[After] = []
    if layer is not None:
        sliding_window = _window(layer, sliding_window)
        key, value, afters = layer.attended(query, scaling, softcap)
        prefix = layer.prefix
    out, mass = attend_with_mass(
        query,
        prefix,
        key,
        value,
        scaling=scaling,
        softcap=softcap,
        window=sliding_window,
        sinks=s_aux,
        live=_live_columns(attention_mask, key.shape[2], layer),
        at=None if layer is None else layer.at,
    )
    for after in afters:
        after(mass)
    # Some models take a view of the output, which the stock functions allow.
    return out.contiguous(), None


def _window(layer: CompactLayer, asked: int | None) -> int | None:
    """The window to apply, if it is the one the layer was made for.

    Raises UsageError for a text that has outgrown a window that was ignored; see `probe`.
    """
    window = layer.geometry.window
    if window is None and asked is not None:
        if layer.length <= asked:
            layer.horizon = asked
            return None
        raise UsageError(
            f"layer {layer.index} sees no more than {asked:,} tokens at once",
            "shorten the document, or choose a model with a longer context",
            code="document-too-long",
            field="source",
            limit=asked,
        )
    if window != asked:
        raise ValueError(
            f"layer {layer.index} was made for window {window}, the model asks for {asked}"
        )
    return window


def live_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The padding of the sequence `[B, logical length]`, or None when there is none.

    Causality and windows are left to `attention`: layers of one model may hold different numbers
    of tokens, so one mask cannot fit them all. Raises NotImplementedError for any other pattern.
    """
    record = _recording.get()
    if record is not None and local_size is not None:
        record.mask_windows.add(local_size)
    if use_vmap or not allow_is_causal_skip:
        raise NotImplementedError("amkv attention knows causal and sliding-window masks only")
    if attention_mask is None or _unpadded.get() or bool(attention_mask.all()):
        return None
    return attention_mask


def _live_columns(
    mask: torch.Tensor | None, n: int, layer: CompactLayer | None
) -> torch.Tensor | None:
    """The mask's columns of the `n` live tokens, which are always the newest ones."""
    if mask is None:
        return None
    if mask.shape[1] < n:
        raise ValueError(f"attention_mask covers {mask.shape[1]} tokens, the cache holds {n}")
    if layer is not None and layer.prefix is not None:
        # A shared prefix cannot be padding for one sequence and text for another.
        if mask.shape[1] != layer.length:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens, the sequence has {layer.length}"
            )
        # Rows with contexts of their own are padded on the left, before what the contexts cover.
        if layer.prefix.batch is None and not bool(mask[:, : layer.prefix_length].all()):
            raise ValueError("attention_mask hides tokens that the compact prefix stands for")
    return mask[:, mask.shape[1] - n :]


def _refuse(
    module: torch.nn.Module, mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    if dropout:
        raise NotImplementedError("amkv attention has no dropout: put the model in eval mode")
    if mask is not None and mask.ndim != 2:
        raise NotImplementedError(f"amkv attention takes a 2-D attention_mask, got {mask.ndim}-D")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotImplementedError("amkv attention is causal, and this layer is bidirectional")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"amkv attention does not support {name}")
