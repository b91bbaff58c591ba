"""Models of well-known shapes with random weights, to measure time and memory on.

Their output is noise: no number about quality may come from them. Token ids are those of pocket,
whose tokenizer is small; the vocabulary has the real size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from amcli.errors import UsageError, did_you_mean
from amcli.models.attention import NAME, register
from amcli.models.devices import DTYPES, device_of
from amcli.models.failures import quiet
from amcli.models.identity import identify
from amcli.models.loading import LoadedModel
from amcli.models.probe import probe
from amcli.models.template import ChatTemplate

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-4b": (
        "qwen3",
        {
            "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "max_position_embeddings": 262_144, "tie_word_embeddings": True,
        },
    ),
    "llama3-8b": (
        "llama",
        {
            "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "max_position_embeddings": 262_144,
        },
    ),
    "gemma3-12b": (
        "gemma3_text",
        {
            "vocab_size": 262_208, "hidden_size": 3840, "intermediate_size": 15_360,
            "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 256, "sliding_window": 1024, "max_position_embeddings": 262_144,
        },
    ),
}  # fmt: skip
"""Shapes by name: the model type, and its configuration fields."""

_KNOWN_TOKENS = 8.0


def shaped(
    name: str, *, device: str | None = None, dtype: str | None = None, **sizes: Any
) -> LoadedModel:
    """A model of that shape with random weights; `sizes` replace fields of its configuration.

    Raises UsageError for an unknown shape, device or dtype.
    """
    if name not in SHAPES:
        meant = did_you_mean(name, SHAPES)
        raise UsageError(
            f"unknown shape {name!r}",
            f"{meant}shapes: {', '.join(SHAPES)}",
            code="unknown-shape",
            field="shape",
            shape=name,
        )
    from amcli.pocket import folder

    register()
    kind, fields = SHAPES[name]
    place = device_of(device)
    number = DTYPES[dtype] if dtype else (torch.float32 if place.type == "cpu" else torch.bfloat16)
    config = AutoConfig.for_model(kind, **{**fields, **sizes})
    with quiet(), torch.device(place), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=NAME, dtype=number
        )
        tokenizer = AutoTokenizer.from_pretrained(folder())
        model.train(False).requires_grad_(False)
        # Make words that the tokenizer knows likely, so that no reply is empty.
        words = [
            i
            for i in range(len(tokenizer))
            if str(tokenizer.decode([i], skip_special_tokens=True)).strip()
        ]
        head = model.get_output_embeddings().weight
        head[words] *= _KNOWN_TOKENS
        geometry = probe(model)
    chat = ChatTemplate(tokenizer, None)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        id=f"{name}, random weights",
        revision=None,
        geometry=geometry,
        device=geometry.devices[0],
        dtype=number,
        identity=identify(model, config, chat),
        chat=chat,
    )
