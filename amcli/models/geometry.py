"""What a model's KV cache looks like: layers, KV heads, dimensions, windows.

Plain facts that the cache, the file format and the mathematics agree on. `probe` finds them; this
module also refuses configurations that cannot work before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from amcli.errors import UsageError
from amcli.models.state import EMPTY, STATEFUL

SUPPORTED = "amkv works with decoder-only models with softmax attention, such as Qwen/Qwen3-4B"


@dataclass(frozen=True)
class LayerGeometry:
    """One attention layer: per token, `kv_heads` keys of `key_dim` and values of `value_dim`.

    `window` is the number of tokens a query sees, itself included; None for a full layer.
    """

    type: Literal["full", "sliding"]
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def __post_init__(self) -> None:
        if (self.type == "sliding") != (self.window is not None):
            raise ValueError(f"a {self.type} layer with window {self.window}")

    def times(self, shards: int) -> LayerGeometry:
        """The whole layer, if this is one of `shards` equal shards of its heads."""
        return replace(self, kv_heads=self.kv_heads * shards)

    def manifest(self, shards: int = 1) -> dict[str, Any]:
        """The manifest's form of the whole layer, if this is one of `shards` equal shards."""
        return {
            "type": self.type,
            "kv_heads": self.kv_heads * shards,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "window": self.window,
        }


@dataclass(frozen=True)
class ModelGeometry:
    """The attention layers of a model in order, and what determines positions.

    Two are equal when the caches of one fit the other.

    query_heads    query heads of each layer, a multiple of that layer's KV heads
    max_positions  longest sequence the model was made for, in tokens; None when not said
    rope           RoPE parameters as the configuration has them, plain JSON; {} without RoPE
    architecture   class name, such as `Qwen3ForCausalLM`
    turned_for     length in tokens for which RoPE rotates keys, where its frequencies depend on it
    states         layers without keys and values, which keep a state or nothing, by their index
                   among all of the model's layers; elsewhere, layer `i` means `layers[i]`
    kept           shape of each state for a batch of one, by the model's layer and the state's name
    devices        the device of each of `layers`
    state_devices  the device of each layer in `states`, by its index among all layers
    """

    layers: tuple[LayerGeometry, ...]
    query_heads: tuple[int, ...]
    max_positions: int | None = field(compare=False)
    rope: dict[str, Any]
    architecture: str
    turned_for: int | None = None
    states: tuple[int, ...] = ()
    kept: Mapping[tuple[int, str], tuple[int, ...]] = field(default_factory=dict, compare=False)
    devices: tuple[torch.device, ...] = field(default=(), compare=False)
    state_devices: Mapping[int, torch.device] = field(default_factory=dict, compare=False)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the layers that can be compacted: those with no sliding window."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.type == "full")


ATTENTION = frozenset({"full_attention", "sliding_attention"})
"""Configurations' names for layers that cache keys and values."""

# What an unsupported layer keeps or reads, by the configurations' name for its kind.
_BOTH = "which keep a state beside keys and values"
_CHOSEN = "which choose the keys that they read, and choose by what a compact cache does not have"
_REASONS = {
    "chunked_attention": "which see their own chunk of the text only",
    "compressed_sparse_attention": _CHOSEN,
    "deepseek_sparse_attention": _CHOSEN,
    "heavily_compressed_attention": _CHOSEN,
    "hybrid": _BOTH,
    "hybrid_sliding": _BOTH,
    "indexed_attention": _CHOSEN,
    "minimax_m3_sparse": _CHOSEN,
    "qwen_sparse_attention": _CHOSEN,
}


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Raise UsageError when the configuration alone shows that the model cannot work."""
    name = getattr(config, "model_type", None) or type(config).__name__
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        refuse(name, "it is an encoder-decoder model")
    # Not getattr: it raises where layers differ in this field.
    if vars(text).get("kv_lora_rank") is not None:
        refuse(name, "it uses multi-head latent attention (MLA), which caches latents")
    kinds = set(getattr(text, "layer_types", None) or ())
    other = sorted(kinds - ATTENTION - STATEFUL - EMPTY)
    if other:
        reason = _REASONS.get(other[0], "which amkv does not know")
        refuse(name, f"it has {other[0]} layers, {reason}")
    if kinds and not kinds & ATTENTION:
        refuse(name, "all of its layers keep a state instead of keys and values")
    if kinds & STATEFUL and getattr(text, "number_of_conv_states", 1) != 1:
        refuse(name, "its layers keep several states")
    if "reuse" in (getattr(text, "kv_sharing_modes", None) or ()) or (
        getattr(text, "num_kv_shared_layers", None)
    ):
        refuse(name, "some of its layers share one KV cache")


def refuse(name: str, reason: str) -> NoReturn:
    """Raise UsageError saying that a model type cannot work, and why."""
    raise UsageError(
        f"the model type {name} is not supported: {reason}",
        SUPPORTED,
        code="model-unsupported",
        field="model",
        model=name,
        reason=reason,
    )


def refuse_attention(name: str) -> NoReturn:
    """Raise UsageError for a model whose attention cannot be replaced from outside."""
    refuse(name, "its attention does not go through transformers' AttentionInterface")


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a model that reads tokens into a cache: all but the LM head."""
    found = cast(Any, model).get_decoder()
    # Some models call their LM head, or part of it, a decoder.
    return found if isinstance(found, PreTrainedModel) else model.base_model


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """RoPE parameters of the text model as plain JSON values, per layer type where they differ."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None)
    return _plain(rope) if rope else {}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
