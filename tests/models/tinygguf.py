"""Tiny llama models in GGUF files, written by the package gguf from a model of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tinymodels as tiny
import tinytokenizer as tt
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

VOCAB = 330
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "intermediate_size": 64}

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@cache
def original() -> PreTrainedModel:
    """The model that the files are made from."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny.config("llama", **SIZES)).eval()


def write(
    path: Path,
    *,
    architecture: str = "llama",
    packed: bool = False,
    template: str | None = tt.CHATML,
    tokenizer: bool = True,
    leave_out: Collection[str] = (),
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    **split: Any,
) -> None:
    """Matrices of the layers in Q8_0 where `packed`, the embedding in F16, the rest in F32."""
    writer = gguf.GGUFWriter(path, architecture, **split)
    config = original().config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    if tokenizer:
        _add_tokenizer(writer, template)
    edit(writer)
    for name, tensor in _tensors(config).items():
        if name not in leave_out:
            _add(writer, name, tensor, packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, template: str | None) -> None:
    made = tt.make(eos="<|im_end|>")
    vocabulary = sorted(made.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
    control = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in tt.CONTROL else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(merges(made))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    if template is not None:
        writer.add_chat_template(template)


def merges(tokenizer: Any) -> list[str]:
    """Of its BPE, as files have them."""
    found = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in found]


def _tensors(config: LlamaConfig) -> dict[str, np.ndarray]:
    found = {}
    for name, value in original().state_dict().items():
        stem, _, suffix = name.rpartition(".")
        tensor = value.numpy()
        if stem.startswith("model.layers."):
            number, _, inner = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{number}.{_LAYER[inner]}"
            if inner.endswith(("q_proj", "k_proj")):
                tensor = _neighbours(tensor, config.head_dim)
        else:
            stem = _OTHER[stem]
        found[f"{stem}.{suffix}"] = tensor
    return found


def _neighbours(tensor: np.ndarray, dim: int) -> np.ndarray:
    """Rows as llama.cpp has them: the two that RoPE turns together side by side."""
    return tensor.reshape(-1, 2, dim // 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)


def _add(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, packed: bool) -> None:
    if packed and name.startswith("blk.") and tensor.ndim == 2:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    elif packed and name == "token_embd.weight":
        writer.add_tensor(name, tensor.astype(np.float16))
    else:
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
