"""Find a model's geometry by feeding it one token and looking at the tensors that pass.

Configurations name heads, dimensions and windows in too many ways; tensors do not. The probe
also proves that the model really goes through the registered attention function.
"""

from __future__ import annotations

from typing import NoReturn, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from amcli.errors import AmkvError
from amcli.models.attention import NAME, Recording, recording
from amcli.models.cache import CompactCache
from amcli.models.geometry import (
    LayerGeometry,
    ModelGeometry,
    refuse,
    refuse_attention,
    refuse_unsupported,
    rope_parameters,
)
from amcli.models.lengths import trained_length


def probe(model: PreTrainedModel) -> ModelGeometry:
    """The geometry of a model loaded with `attn_implementation="amkv"`; feeds it two tokens.

    Raises UsageError, naming the reason, when the model cannot work with a compact cache.
    """
    refuse_unsupported(model.config)
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        raise ValueError(f"load the model with attn_implementation={NAME!r}")
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    with recording() as seen:
        _feed_one_token(model, cache)
    limit = trained_length(model.config)
    layers = _layers(model, cache, seen, limit)
    geometry = ModelGeometry(
        layers=layers,
        query_heads=tuple(call.query_heads for call in seen.calls),
        max_positions=limit,
        rope=rope_parameters(model.config),
        architecture=type(model).__name__,
    )
    # The same token through the real cache: a model that copies keys on their way to the
    # attention function would lose the prefix, and is found out here rather than in use.
    _feed_one_token(model, CompactCache.empty(geometry))
    return geometry


def _feed_one_token(model: PreTrainedModel, cache: Cache) -> None:
    ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    try:
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if isinstance(cache, CompactCache):
            cache.require_attended()
    except torch.OutOfMemoryError:
        raise
    except (AmkvError, ArithmeticError, AttributeError, LookupError, NotImplementedError) as error:
        _refuse_for(model, error)
    except (RuntimeError, TypeError, ValueError) as error:
        _refuse_for(model, error)


def _refuse_for(model: PreTrainedModel, error: Exception) -> NoReturn:
    name = model.config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        refuse_attention(name)
    refuse(name, (str(error) or type(error).__name__).splitlines()[0])


def _layers(
    model: PreTrainedModel, cache: Cache, seen: Recording, limit: int | None
) -> tuple[LayerGeometry, ...]:
    name = model.config.model_type
    if not seen.calls:
        refuse_attention(name)
    if len(seen.calls) != len(cache.layers):
        refuse(name, f"its {len(cache.layers)} caching layers attend {len(seen.calls)} times")
    asked = seen.mask_windows - {call.window for call in seen.calls}
    hidden = sorted(window for window in asked if not _covers(window, limit))
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        hidden = []  # a mask that no layer uses
    if hidden:
        refuse(name, f"it applies its window of {hidden[0]} tokens through the mask only")
    found = []
    for call, layer in zip(seen.calls, cache.layers, strict=True):
        keys, values = cast(DynamicLayer, layer).keys, cast(DynamicLayer, layer).values
        if keys is None or values is None:
            refuse(name, "one of its layers caches nothing")
        window = None if _covers(call.window, limit) else call.window
        found.append(
            LayerGeometry(
                type="full" if window is None else "sliding",
                kv_heads=keys.shape[1],
                key_dim=keys.shape[3],
                value_dim=values.shape[3],
                window=window,
            )
        )
    return tuple(found)


def _covers(window: int | None, limit: int | None) -> bool:
    """Whether a window hides nothing of any text the model was made for: no window, in effect."""
    return window is None or (limit is not None and window >= limit)
