"""Find a model's geometry by feeding it a token and looking at the tensors that pass through.

Configurations name heads, dimensions and windows in too many ways; tensors do not. The probe
also proves that the model really goes through the registered attention function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from amcli.errors import AmkvError
from amcli.models.attention import NAME, Recording, recording
from amcli.models.cache import CompactCache
from amcli.models.calling import run
from amcli.models.failures import out_of_memory
from amcli.models.geometry import (
    LayerGeometry,
    ModelGeometry,
    refuse,
    refuse_attention,
    refuse_unsupported,
    rope_parameters,
)
from amcli.models.lengths import trained_length
from amcli.models.state import EMPTY, STATEFUL, StateLayer


def probe(model: PreTrainedModel) -> ModelGeometry:
    """The geometry of a model loaded with `attn_implementation="amkv"`; feeds it a few tokens.

    Raises UsageError, naming the reason, when the model cannot work with a compact cache.
    """
    refuse_unsupported(model.config)
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        raise ValueError(f"load the model with attn_implementation={NAME!r}")
    states = _states(model)
    cache = _plain_cache(model, states)
    with recording() as seen:
        _feed(model, cache, [0])
    limit = trained_length(model.config)
    layers = _layers(model, cache, seen, limit)
    geometry = ModelGeometry(
        layers=layers,
        query_heads=tuple(call.query_heads for call in seen.calls),
        max_positions=limit,
        rope=rope_parameters(model.config),
        architecture=type(model).__name__,
        states=states,
        devices=tuple(call.device for call in seen.calls),
    )
    # The same token through the real cache: a model that copies keys on their way to the
    # attention function would lose the prefix, and is found out here rather than in use.
    real = CompactCache.empty(geometry)
    _feed(model, real, [0])
    if not states:
        return geometry
    _require_going_on(model, geometry)
    # A state has a fixed size, so one token shows what a file has to hold.
    found = real.get_states()
    kept = {place: tuple(state.shape) for place, state in found.items()}
    devices = {place: state.device for (place, _), state in found.items()}
    return replace(geometry, kept=kept, state_devices=devices)


def _states(model: PreTrainedModel) -> tuple[int, ...]:
    """The layers that cache no keys and values, by the configuration's names for layers."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return tuple(i for i, kind in enumerate(kinds) if kind in STATEFUL | EMPTY)


def _require_going_on(model: PreTrainedModel, geometry: ModelGeometry) -> None:
    """Refuse a model that ignores its state when it reads several tokens at once.

    Some in transformers do, even with their own cache: each chunk of a document, or a question
    after it, would be read as if it stood alone.
    """
    at_once = _feed(model, CompactCache.empty(geometry), [1, 2, 3, 4, 5, 6, 7, 8])
    cache = CompactCache.empty(geometry)
    _feed(model, cache, [1, 2, 3, 4])
    in_two = _feed(model, cache, [5, 6, 7, 8])
    # 16-bit models round; a state that is ignored changes far more.
    if not (at_once - in_two).norm() <= 0.05 * at_once.norm():
        refuse(model.config.model_type, "it forgets its state when it reads several tokens at once")


def _plain_cache(model: PreTrainedModel, states: tuple[int, ...]) -> Cache:
    """A cache of transformers' own layers."""
    if not states:
        return Cache(layer_class_to_replicate=DynamicLayer)
    count = len(model.config.get_text_config(decoder=True).layer_types)
    layer: Callable[[], Any] = DynamicLayer
    return Cache(layers=[StateLayer() if i in states else layer() for i in range(count)])


def _feed(model: PreTrainedModel, cache: Cache, ids: list[int]) -> torch.Tensor:
    """The last token's logits `[V]`, float32; UsageError for anything the model does wrong."""
    tokens = torch.tensor([ids], device=model.device)
    try:
        with torch.no_grad():
            output = run(model, cache, tokens, logits_to_keep=1)
        if isinstance(cache, CompactCache):
            cache.require_attended()
        return cast(torch.Tensor, output.logits[0, -1].float())
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # the device's fault
    except (AmkvError, ArithmeticError, AttributeError, LookupError, NotImplementedError) as error:
        _refuse_for(model, error)
    except (RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
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
    caching = [layer for layer in cache.layers if not isinstance(layer, StateLayer)]
    if len(seen.calls) != len(caching):
        refuse(name, f"its {len(caching)} caching layers attend {len(seen.calls)} times")
    asked = seen.mask_windows - {call.window for call in seen.calls}
    hidden = sorted(window for window in asked if not _covers(window, limit))
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        hidden = []  # a mask that no layer uses
    if hidden:
        refuse(name, f"it applies its window of {hidden[0]} tokens through the mask only")
    found = []
    for call, layer in zip(seen.calls, caching, strict=True):
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
    """Whether a window covers the longest text the model was made for: no window, in effect."""
    return window is None or (limit is not None and window >= limit)
