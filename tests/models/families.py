"""Every decoder family that amkv works with, one row each; `refusals` has the others.

The rows are data: the test of families runs each of them, and `docs/models.md` is written from
them. What is peculiar about a family stands in its row and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import tinymodels as tiny
import tinytokenizer as tt
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from amcli.models.calling import GENERATE, run
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.source import Source

VOCAB, POSITIONS, WINDOW = 340, 4096, 7
DOCUMENT = Source("doc.txt", "Anna owns a lynx, and Omar an otter. They live by the sea. " * 3)
QUESTION = "Who lives in the house by the sea?"

SOME = ["sliding_attention", "full_attention", "sliding_attention"]
LAST = ["sliding_attention", "sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
CONVOLVED = ["conv", "full_attention", "conv"]
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "initializer_range": 0.1,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
MIXED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": SOME}
WINDOWED: dict[str, Any] = {"sliding_window": WINDOW}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip


EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GEMMA4: dict[str, Any] = {
    **MIXED,
    "layer_types": LAST,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}


@dataclass(frozen=True)
class Family:
    """One row. `layers` has a letter a layer of the tiny model: f(ull), s(liding) or k(ept state).

    hub      a model of the family on the Hugging Face hub; empty where none is known
    options  of its configuration, beside those that all tiny models have
    note     what is special about its attention
    around   of the configuration that the text model's stands in, where there is one
    """

    hub: str
    layers: str = "fff"
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    around: dict[str, Any] | None = None

    @property
    def kept(self) -> str:
        """Which layers are stored as they are."""
        if "k" in self.layers:
            return "layers with a state"
        return "sliding-window layers" if "s" in self.layers else ""


def row(hub: str, note: str = "", layers: str = "fff", **options: Any) -> Family:
    return Family(hub, layers, options, note)


def mixed(hub: str, note: str = "", layers: str = "sfs", **options: Any) -> Family:
    """Sliding-window layers beside full ones."""
    return Family(hub, layers, {**MIXED, **options}, note)


def hybrid(hub: str, note: str = "", layers: str = "kfk", **options: Any) -> Family:
    """Layers that keep a state beside full ones."""
    return Family(hub, layers, {"layer_types": LINEAR, **options}, note)


FAMILIES: dict[str, Family] = {
    "afmoe": mixed("arcee-ai/Trinity-Mini", "gated; full layers without RoPE", **EXPERTS),
    "apertus": row("swiss-ai/Apertus-8B-Instruct-2509"),
    "arcee": row("arcee-ai/AFM-4.5B"),
    "aria_text": row("rhymes-ai/Aria", moe_num_experts=4, moe_topk=2),
    "biogpt": row("microsoft/biogpt", "learned positions; one KV head a query head"),
    "bitnet": row("microsoft/bitnet-b1.58-2B-4T"),
    "cohere": row("CohereForAI/c4ai-command-r-v01", "RoPE on neighbouring channels"),
    "cohere2": mixed("CohereLabs/c4ai-command-r7b-12-2024", "full layers without RoPE"),
    "ctrl": row("Salesforce/ctrl", "fixed positions; one KV head a query head"),
    "cwm": mixed("facebook/cwm"),
    "ernie4_5": row("baidu/ERNIE-4.5-0.3B-PT", "RoPE on neighbouring channels"),
    "ernie4_5_moe": row("baidu/ERNIE-4.5-21B-A3B-PT", moe_num_experts=4, moe_k=2),
    "exaone4": mixed("LGAI-EXAONE/EXAONE-4.0-32B", "full layers without RoPE"),
    "exaone_moe": mixed("LGAI-EXAONE/K-EXAONE-236B-A23B", "full layers without RoPE", **EXPERTS),
    "flex_olmo": row("allenai/FlexOlmo-7x7B-1T", **EXPERTS),
    "gemma": row("google/gemma-7b"),
    "gemma2": mixed(
        "google/gemma-2-9b", "softcap", query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
    "gemma3_text": mixed("google/gemma-3-1b-it", "two RoPE bases", query_pre_attn_scalar=8),
    "gemma3": Family(
        "google/gemma-3-4b-it",
        "sfs",
        {**MIXED, "query_pre_attn_scalar": 8},
        "the text part of a model that also sees",
        {"vision_config": {**EYES, "image_size": 8, "patch_size": 4}, "mm_tokens_per_image": 4},
    ),
    "gemma4": Family(
        "",
        "ssf",
        GEMMA4,
        "the text part of a model that also sees and hears",
        {"vision_config": None, "audio_config": None},
    ),
    "gemma4_text": mixed(
        "",
        "partial RoPE in full layers",
        "ssf",
        layer_types=LAST,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
    ),
    "glm": row("THUDM/glm-4-9b-chat", "partial RoPE"),
    "glm4": row("THUDM/GLM-4-9B-0414", "partial RoPE"),
    "glm4_moe": row("zai-org/GLM-4.5", "partial RoPE", **ROUTED),
    "gpt2": row("openai-community/gpt2", "learned positions; one KV head a query head"),
    "gpt_bigcode": row("bigcode/gpt_bigcode-santacoder", "one KV head for all query heads"),
    "gpt_neox": row("EleutherAI/gpt-neox-20b", "partial RoPE; one KV head a query head"),
    "gpt_oss": mixed("openai/gpt-oss-20b", "attention sinks; YaRN", **LOCAL),
    "granite": row("ibm-granite/granite-3.3-8b-instruct"),
    "granitemoe": row("ibm-granite/granite-3.1-3b-a800m-instruct", **LOCAL),
    "granitemoeshared": row("ibm-research/moe-7b-1b-active-shared-experts", **LOCAL),
    "helium": row("kyutai/helium-1-preview"),
    "hunyuan_v1_dense": row("tencent/Hunyuan-7B-Instruct"),
    "hunyuan_v1_moe": row("tencent/Hunyuan-A13B-Instruct", num_experts=4, moe_topk=2),
    "hy_v3": row("tencent/Hy3-preview", **EXPERTS),
    "hyperclovax": row("naver-hyperclovax/HyperCLOVAX-SEED-Think-14B"),
    "granitemoehybrid": hybrid(
        "ibm-granite/granite-4.0-h-tiny",
        "Mamba 2",
        shared_intermediate_size=16,
        **MAMBA,
        **LOCAL,
    ),
    "internlm3": row("internlm/internlm3-8b-instruct"),
    "jais2": row("inceptionai/Jais-2-8B-Chat"),
    "laguna": mixed("poolside/laguna-XS.2", **EXPERTS),
    "lfm2": hybrid("LiquidAI/LFM2-1.2B", "short convolutions", layer_types=CONVOLVED),
    "lfm2_moe": hybrid(
        "LiquidAI/LFM2-8B-A1B",
        "short convolutions",
        layer_types=CONVOLVED,
        num_dense_layers=1,
        **EXPERTS,
    ),
    "llama": row("meta-llama/Llama-3.1-8B-Instruct", "also Llama 2 and 3, with or without GQA"),
    "mellum": mixed("JetBrains/Mellum2-12B-A2.5B-Base", **EXPERTS),
    "mimo_v2_flash": mixed(
        "XiaomiMiMo/MiMo-V2-Flash",
        "attention sinks; values narrower than keys",
        v_head_dim=4,
        **ROUTED,
    ),
    "minimax_m2": row("MiniMaxAI/MiniMax-M2", "partial RoPE", **LOCAL),
    "ministral": mixed("mistralai/Ministral-8B-Instruct-2410"),
    "ministral3": row("mistralai/Ministral-3-8B-Instruct-2512", "queries scaled by position"),
    "mistral": row("mistralai/Mistral-7B-Instruct-v0.3", sliding_window=None),
    "mixtral": row("mistralai/Mixtral-8x7B-Instruct-v0.1", sliding_window=None, **LOCAL),
    "modernbert-decoder": mixed("jhu-clsp/ettin-decoder-150m", "one KV head a query head"),
    "nanochat": row("karpathy/nanochat-d32"),
    "nemotron": row("nvidia/Minitron-4B-Base", "partial RoPE"),
    "nemotron_h": hybrid(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "Mamba 2; no RoPE; layers without attention",
        layer_types=tiny.ABSENT,
        layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "olmo": row("allenai/OLMo-7B-hf"),
    "olmo2": row("allenai/OLMo-2-1124-7B-Instruct"),
    "olmo3": mixed("allenai/Olmo-3-7B-Instruct"),
    "olmo_hybrid": hybrid(
        "allenai/Olmo-Hybrid-7B",
        "gated delta net; RoPE only where the configuration has it",
        **DELTA,
    ),
    "olmoe": row("allenai/OLMoE-1B-7B-0924", **EXPERTS),
    "opt": row(
        "facebook/opt-350m",
        "learned positions; one KV head a query head",
        ffn_dim=48,
        word_embed_proj_dim=32,
    ),
    "persimmon": row("adept/persimmon-8b-base", "partial RoPE; one KV head a query head"),
    "phi": row("microsoft/phi-2", "partial RoPE"),
    "phi3": row("microsoft/phi-4", "partial RoPE in some; a window beyond all positions is none"),
    "phimoe": row("microsoft/Phi-3.5-MoE-instruct", sliding_window=None, **LOCAL),
    "qwen2": row("Qwen/Qwen2.5-7B-Instruct"),
    "qwen2_moe": row("Qwen/Qwen1.5-MoE-A2.7B", shared_expert_intermediate_size=16, **EXPERTS),
    "qwen3": row("Qwen/Qwen3-4B"),
    "qwen3_5": Family(
        "Qwen/Qwen3.5-27B",
        "kfk",
        {"layer_types": LINEAR, **DELTA},
        "gated delta net; the text part of a model that also sees",
        {
            "vision_config": {
                "depth": 1,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
                "hidden_size": 16,
                "intermediate_size": 16,
            }
        },
    ),
    "qwen3_5_moe_text": hybrid(
        "Qwen/Qwen3.5-35B-A3B",
        "gated delta net",
        shared_expert_intermediate_size=16,
        **DELTA,
        **EXPERTS,
    ),
    "qwen3_5_text": hybrid("Qwen/Qwen3.5-27B", "gated delta net", **DELTA),
    "qwen3_moe": row("Qwen/Qwen3-30B-A3B", **EXPERTS),
    "qwen3_next": hybrid(
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "gated delta net",
        shared_expert_intermediate_size=16,
        **DELTA,
        **EXPERTS,
    ),
    "seed_oss": row("ByteDance-Seed/Seed-OSS-36B-Instruct"),
    "smollm3": row("HuggingFaceTB/SmolLM3-3B", "every fourth layer without RoPE"),
    "solar_open": row("upstage/Solar-Open-100B", **ROUTED),
    "stablelm": row("stabilityai/stablelm-3b-4e1t", "partial RoPE"),
    "starcoder2": row("bigcode/starcoder2-7b", sliding_window=None),
    "vaultgemma": mixed("google/vaultgemma-1b", query_pre_attn_scalar=8),
}


def known(table: Mapping[str, object] = FAMILIES) -> list[str]:
    """Names in a table that the installed transformers has."""
    return [name for name in table if name in CONFIG_MAPPING]


def config(name: str) -> Any:
    """Configuration of a family's tiny model."""
    family = FAMILIES[name]
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS}
    if family.around is None:
        return tiny.config(name, **sizes, **family.options)
    text = {**tiny.COMMON, **sizes, **family.options}
    return type(AutoConfig.for_model(name))(text_config=text, **family.around)


@cache
def folder(name: str) -> Path:
    """A tiny random model of a family, saved as a user's would be."""
    return saved(config(name), name)


def saved(config: Any, name: str = "tiny") -> Path:
    """A folder with a random model of that configuration and a tokenizer with a chat template."""
    path = Path(mkdtemp(prefix=f"amkv-{name}-"))
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tiny.fill_sinks(network)
    network.save_pretrained(path)
    tt.of("chatml").save_pretrained(path)
    return path


@cache
def loaded(name: str) -> LoadedModel:
    return load(str(folder(name)), device="cpu", dtype="float32")


def eager(path: Path) -> PreTrainedModel:
    """The model of a folder with its own attention, as a judge of the one behind ours."""
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def full_logits(
    judge: PreTrainedModel, context: list[int], ids: list[int], singly: int = 0
) -> torch.Tensor:
    """Logits of `ids` behind the whole context, by the model's own cache: `[m, V]`.

    The last `singly` of them are read one by one, as an answer is written.
    """
    past = getattr(judge(input_ids=torch.tensor([context]), use_cache=True), GENERATE)
    found = []
    for part in torch.tensor([ids]).split([len(ids) - singly] + [1] * singly, dim=1):
        found.append(run(judge, past, part).logits[0])
    return torch.cat(found)


@torch.no_grad()
def cached_logits(context: Context, ids: list[int]) -> torch.Tensor:
    """Logits of `ids` behind a context of the pipeline, full or compact: `[m, V]`."""
    model, cache = context.loaded.model, context.cache.fork()
    return run(model, cache, torch.tensor([ids])).logits[0]
