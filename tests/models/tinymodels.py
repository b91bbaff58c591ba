"""Tiny random models of many architectures: the same seed gives the same weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from amcli.models.attention import NAME, register
from amcli.models.cache import CompactCache
from amcli.models.calling import run
from amcli.models.geometry import ModelGeometry
from amcli.models.probe import probe

VOCAB = 97

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}

ABSENT = object()
"""As an option: not to be given at all, not even what all have."""

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": MOE,
    "mistral": {"sliding_window": 7},
    "ministral": {"sliding_window": 7, "layer_types": ALTERNATING},
    "gemma2": {
        "sliding_window": 7,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "layer_types": ALTERNATING,
    },
    "gemma3_text": {
        "sliding_window": 7,
        "query_pre_attn_scalar": 8,
        "layer_types": ALTERNATING,
    },
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "cohere2": {"sliding_window": 7, "layer_types": ALTERNATING},
    "glm4": {},
    "exaone4": {"sliding_window": 7, "layer_types": ALTERNATING},
    "gpt_oss": {
        "sliding_window": 7,
        "layer_types": ALTERNATING,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def config(architecture: str, **overrides: Any) -> Any:
    kind = AutoConfig.for_model(architecture)
    options = {**COMMON, **ARCHITECTURES.get(architecture, {}), **overrides}
    return type(kind)(**{name: x for name, x in options.items() if x is not ABSENT})


@cache
def build(architecture: str, implementation: str = NAME) -> PreTrainedModel:
    register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(architecture), attn_implementation=implementation, dtype=torch.float32
    )
    fill_sinks(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fill_sinks(model: PreTrainedModel) -> None:
    """Random attention sinks: from_config leaves them as they were in memory."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "sink" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@cache
def geometry(architecture: str) -> ModelGeometry:
    return probe(build(architecture))


def empty(architecture: str) -> CompactCache:
    return CompactCache.empty(geometry(architecture))


def ids(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor, cache: Any = None, **kwargs: Any) -> Any:
    return run(model, cache, tokens, **kwargs).logits
