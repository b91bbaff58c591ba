"""A context for plain transformers: `ids, cache = load(folder, model)`; docs/conversions.md."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


class Layer(DynamicLayer):
    """Keys and values [1, H, n, d], padded; bias [1, H, 1, n] is -inf where nothing is."""

    def get_seq_length(self) -> int:  # what the model has read, not what is stored
        return self.keys.shape[2] - self.bias.shape[3] + self.tokens

    def update(self, keys, values, *args, **kwargs):
        keys, values = super().update(keys, values)
        keys.layer = self
        return keys, values


def attention(module, query, key, value, mask, scaling=None, **options):
    if options.get("softcap") or options.get("s_aux") is not None:
        raise NotImplementedError("this loader knows neither soft caps nor attention sinks")
    m, n, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    bias = torch.full((1, key.shape[1], m, n), -torch.inf, device=query.device).triu(n - m + 1)
    if hasattr(key, "layer"):
        bias[..., : key.layer.bias.shape[3]] += key.layer.bias
    key, value, bias = (x.float().repeat_interleave(groups, dim=1) for x in (key, value, bias))
    out = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key, value, attn_mask=bias, scale=scaling
    )
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def load(folder: str | Path, model: PreTrainedModel) -> tuple[torch.Tensor, Cache]:
    """The document's ids [1, T] and a cache of it; give new tokens behind those ids."""
    AttentionInterface.register("compact", attention)
    model.set_attn_implementation("compact")
    found = load_file(Path(folder) / "cache.safetensors", device=str(model.device))
    layers = []
    while f"keys.{len(layers)}" in found:
        layer, i = Layer(), len(layers)
        keys, values = (found[f"{name}.{i}"].to(model.dtype) for name in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.bias = keys, values, found[f"bias.{i}"]
        layer.tokens = found["ids"].shape[1]
        layers.append(layer)
    return found["ids"], Cache(layers=layers)
