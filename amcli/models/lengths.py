"""Positions: how many a model was trained for, and RoPE whose frequencies depend on the length.

`dynamic` and `longrope` choose their frequencies by the last position of a forward pass. For a
document read in chunks, the first keys would be rotated by other frequencies than the last: so a
cache's geometry says which length to rotate for. And a rotary module that remembers a longer text
would rotate the next one by it, so it is made to forget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from amcli.models.cache import CompactCache
from amcli.models.calling import cache_in
from amcli.models.geometry import ModelGeometry, decoder_of, rope_parameters

_CHANGING = ("dynamic", "longrope")
_LENGTH = "_amkv_length"
_MEMORY = "max_seq_len_cached"


def trained_length(config: PreTrainedConfig) -> int | None:
    """Positions that a model was trained for, with its RoPE scaling; None if not said.

    Most configurations give the scaled length as `max_position_embeddings`. The others give the
    original length and a factor, or, with `dynamic` scaling, just the factor.
    """
    said = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(said, int) or said < 1:
        return None
    rope = _of_full_layers(rope_parameters(config))
    original = rope.get("original_max_position_embeddings")
    if original is None and rope.get("rope_type") == "dynamic":
        original = said
    return said if original is None else max(said, int((rope.get("factor") or 1) * original))


def for_context(geometry: ModelGeometry, tokens: int, spare: int) -> ModelGeometry:
    """The geometry for a context of `tokens` that leaves `spare` positions for answers.

    - With `longrope`, a context that ends within the original length has no positions beyond it:
      there the model switches to other frequencies, which would make the existing keys useless. A
      context that leaves too little room before that point uses the long frequencies.
    - With RoPE, a context may exceed the trained length. It then has no limit, as its positions
      are already past it. See `past_training` for the warning.
    - Other models have a finite table of positions: their geometry stays as it is.
    """
    rope = _of_full_layers(geometry.rope)
    limit, kind = geometry.max_positions, rope.get("rope_type")
    turned_for = tokens if kind in _CHANGING else None
    original = rope.get("original_max_position_embeddings")
    if kind == "longrope" and original is not None:
        # One length stands for all on the same side of the limit, so that their caches fit.
        turned_for = original if tokens + spare <= original else original + 1
        limit = original if turned_for == original else limit
    if limit is not None and geometry.rope and tokens + spare > limit:
        limit = None
    return replace(geometry, max_positions=limit, turned_for=turned_for)


def past_training(config: PreTrainedConfig, tokens: int) -> str | None:
    """The warning for a context of `tokens`; None where the model was trained for that length."""
    limit = trained_length(config)
    if limit is None or tokens <= limit:
        return None
    return (
        f"the context has {tokens:,} tokens, and the model was made for {limit:,}: "
        "expect poor answers"
    )


def changes_with_length(model: PreTrainedModel) -> str | None:
    """The kind of RoPE whose frequencies depend on the length; None where they do not."""
    kinds = sorted({kind for _, kind in _changing(model)})
    return kinds[0] if kinds else None


def forget_lengths(model: PreTrainedModel) -> None:
    """Make the frequencies of a loaded model depend on its cache's geometry and the text alone."""
    modules = [module for module, _ in _changing(model)]
    if not modules:
        return

    def note(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = cache_in(kwargs)
        tokens = cache.geometry.turned_for if isinstance(cache, CompactCache) else None
        for module in modules:
            setattr(module, _LENGTH, tokens)

    decoder_of(model).register_forward_pre_hook(note, with_kwargs=True)
    for module in modules:
        module.register_forward_pre_hook(_before, with_kwargs=True)
        module.register_forward_hook(_after)


def _changing(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Module, str]]:
    """Rotary modules with such frequencies, and their kind."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in _CHANGING:
                yield module, kind
                break


def _before(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forget longer texts, and append the last position of the cache's length to the others."""
    for name in [name for name in vars(module) if name.endswith(_MEMORY)]:
        setattr(module, name, 0)
    tokens = getattr(module, _LENGTH, None)
    if tokens is None:
        return None
    x, places, *rest = args if len(args) > 1 else (*args, kwargs.pop("position_ids"))
    last = torch.full_like(places[..., :1], tokens - 1)
    return (x, torch.cat([places, last], dim=-1), *rest), kwargs


def _after(module: torch.nn.Module, args: tuple[Any, ...], found: Any) -> Any:
    """Cosines and sines `[B, m, channels]` without those of the position that was added."""
    if getattr(module, _LENGTH, None) is None:
        return None
    return tuple(angles[..., :-1, :] for angles in found)


def _of_full_layers(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters; where layer types differ, those of the layers that see the whole text."""
    return rope.get("full_attention", rope) or {}
