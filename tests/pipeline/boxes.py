"""Model folders for the pipeline's tests: tiny random ones of several families, and pocket."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import tinymodels as tiny
import tinytokenizer as tt
import torch
from transformers import AutoModelForCausalLM

from amcli.generator.documents import generate
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.contexts.source import Source

FAMILIES = {
    "llama": "llama3",
    "qwen3": "chatml",
    "mistral": "chatml",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "gpt_oss": "chatml",
}
RAW = "raw"
"""A tiny Llama whose tokenizer has no chat template."""


@cache
def model(name: str) -> LoadedModel:
    """Pocket, or a tiny random model of a family, loaded from a folder as a user would."""
    if name == "pocket":
        return load("pocket", device="cpu")
    folder = Path(mkdtemp(prefix=f"amkv-{name}-"))
    torch.manual_seed(0)
    config = tiny.config(
        "llama" if name == RAW else name, vocab_size=340, max_position_embeddings=4096
    )
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in network.named_parameters():
        if key.endswith("sinks"):  # from_config leaves them as they were in memory
            torch.nn.init.normal_(parameter)
    network.save_pretrained(folder)
    (tt.make() if name == RAW else tt.of(FAMILIES[name])).save_pretrained(folder)
    return load(str(folder), device="cpu", dtype="float32")


def source(length: int = 200, seed: int = 1) -> Source:
    return Source("doc.txt", generate(seed, length).text)
