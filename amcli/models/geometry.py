"""What a model's KV cache looks like: layers, KV heads, dimensions, windows.

Plain facts that the cache, the file format and the mathematics agree on. How they are found is
in `probe`; which configurations are refused before any weight is read is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig

from amcli.errors import UsageError

SUPPORTED = "amkv works with decoder-only models with softmax attention, such as Qwen/Qwen3-4B"


@dataclass(frozen=True)
class LayerGeometry:
    """One attention layer: `kv_heads` keys of `key_dim` and values of `value_dim` a token.

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

    def manifest(self) -> dict[str, Any]:
        """The layer as an artifact's manifest spells it."""
        return {
            "type": self.type,
            "kv_heads": self.kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "window": self.window,
        }


@dataclass(frozen=True)
class ModelGeometry:
    """The layers of a model in order, and what decides positions.

    query_heads    query heads of each layer, a multiple of that layer's KV heads
    max_positions  longest sequence the model was made for, in tokens; None when not said
    rope           RoPE parameters as the configuration has them, plain JSON; {} without RoPE
    architecture   class name, such as `Qwen3ForCausalLM`
    """

    layers: tuple[LayerGeometry, ...]
    query_heads: tuple[int, ...]
    max_positions: int | None
    rope: dict[str, Any]
    architecture: str

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the layers that can be compacted: those with no sliding window."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.type == "full")


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Raise UsageError when the configuration alone shows that the model cannot work."""
    name = getattr(config, "model_type", None) or type(config).__name__
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        _refuse(name, "it is an encoder-decoder model")
    if getattr(text, "kv_lora_rank", None) is not None:
        _refuse(name, "it uses multi-head latent attention (MLA), which caches latents")
    kinds = set(getattr(text, "layer_types", None) or ())
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    if other:
        _refuse(name, f"it has {other[0]} layers, which keep a state instead of keys and values")
    if "reuse" in (getattr(text, "kv_sharing_modes", None) or ()) or (
        getattr(text, "num_kv_shared_layers", None)
    ):
        _refuse(name, "some of its layers share one KV cache")


def _refuse(name: str, reason: str) -> None:
    raise UsageError(f"the model type {name} is not supported: {reason}", SUPPORTED)


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
