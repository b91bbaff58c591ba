"""Families that amkv refuses, and why: one row each, as in `families`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tinymodels as tiny
import tinytokenizer as tt
import torch
import transformers
from families import LINEAR, LOCAL, MAMBA, VOCAB, WINDOWED, known
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True)
class Refusal:
    """A family that cannot work: why, what the message says, and options of a tiny model.

    Where `options` is None, the default configuration is enough to refuse it: no weights needed.
    From version `until` of transformers on the family is written so that it may work, and nothing
    is said of it.
    """

    why: str
    says: str
    options: dict[str, Any] | None = None
    until: str = ""


MLA = Refusal("multi-head latent attention caches latents, not keys and values", "(MLA)")
TWO = Refusal("encoder and decoder", "it is an encoder-decoder model")
STATE = Refusal("layers that keep a state, and none with keys and values", "all of its layers")
BOTH = Refusal("layers that keep a state beside keys and values", "beside keys and values")
CHOSEN = Refusal("layers that choose which keys to read, by an index of their own", "choose the")
SHARED = Refusal("layers that share one KV cache", "share one KV cache")


def forgetful(**options: Any) -> Refusal:
    why = "a state that transformers forgets when several tokens are read at once"
    return Refusal(why, "forgets its state", options)


def own(until: str = "", **options: Any) -> Refusal:
    says = "its attention does not go through transformers' AttentionInterface"
    why = "attention or state of its own, not `AttentionInterface`"
    return Refusal(f"{why}, before transformers {until}" if until else why, says, options, until)


def refused() -> list[str]:
    """Families that the installed transformers has, and that amkv refuses with it."""
    installed = Version(transformers.__version__)
    return [n for n in known(REFUSED) if not (u := REFUSED[n].until) or installed < Version(u)]


REFUSED: dict[str, Refusal] = {
    "bamba": forgetful(attn_layer_indices=[1], **MAMBA),
    "bart": TWO,
    "bert": Refusal("attention that sees what comes after", "causal and sliding-window", {}),
    "bloom": own(),
    "codegen": own(until="5.24", rotary_dim=4),
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": CHOSEN,
    "diffllama": Refusal("two attentions a layer", "3 caching layers attend 6 times", {}),
    "doge": Refusal("a mask that depends on the values", "amkv attention", {}),
    "dots3_note": MLA,
    "falcon": own(head_dim=tiny.ABSENT),
    "falcon_h1": BOTH,
    "falcon_mamba": STATE,
    "gemma3n_text": SHARED,
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "gpt_neo": own(attention_types=[[["global", "local", "global"], 1]]),
    "gptj": own(until="5.24", rotary_dim=4),
    "jamba": forgetful(
        attn_layer_period=3, attn_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4
    ),
    "jetmoe": Refusal(
        "heads that are copied after the cache",
        "no amkv attention has read",
        {**LOCAL, "kv_channels": 8},
    ),
    "kimi_linear": MLA,
    "llama4_text": Refusal("layers that see their own chunk only", "their own chunk"),
    "longcat_flash": MLA,
    "mamba": STATE,
    "mamba2": STATE,
    "minicpm3": MLA,
    "minimax": Refusal("a cache of its own", "cache of its own", {"layer_types": LINEAR, **LOCAL}),
    "mpt": own(),
    "openai-gpt": own(),
    "phimoe": Refusal(
        "a window shorter than its positions, which only the mask knows of",
        "window of 7 tokens through the mask only",
        {**WINDOWED, **LOCAL},
    ),
    "qwen4_exp_text": Refusal(CHOSEN.why, "layers, which"),
    "rwkv": own(attention_hidden_size=32),
    "t5": TWO,
    "whisper": TWO,
    "xglm": own(),
    "xlstm": own(),
    "youtu": MLA,
    "zamba2": BOTH,
}


def refused_folder(name: str, path: Path) -> Path:
    """A model of a family that is refused; without weights where none need be read."""
    made = REFUSED[name].options
    if made is None:
        AutoConfig.for_model(name).save_pretrained(path)
        (path / "model.safetensors").write_bytes(b"never read")
    else:
        kind = tiny.config(name, vocab_size=VOCAB, **made)
        AutoModelForCausalLM.from_config(kind, dtype=torch.float32).save_pretrained(path)
    tt.of("chatml").save_pretrained(path)
    return path
