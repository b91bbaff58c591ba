"""The packaged model: what is in the box, and that stock transformers can use it."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from pocketbox import sampler, tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from amcli.generator.dialogues import QUESTION_KINDS, Questioner
from amcli.generator.documents import generate
from amcli.pocket import folder
from amcli.trainer.train import PRESETS, build


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)


def test_the_weights_fit_in_the_box() -> None:
    file = folder() / "model.safetensors"
    assert file.stat().st_size <= 24_000_000
    with safe_open(file, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert not list(folder().glob("*.py"))
    assert "auto_map" not in json.loads((folder() / "config.json").read_text())


def test_the_model_is_the_published_preset(model: PreTrainedModel) -> None:
    fresh = build(PRESETS["pocket"], len(tokenizer()))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in fresh.named_parameters()}
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    for name in ("head_dim", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(fresh.config, name), name


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_stock_transformers_answers_from_a_document(model: PreTrainedModel, kind: str) -> None:
    document = generate("eval/stock", 700, sampler().measure, len(sampler().blank))
    for question in Questioner(document).distinct(Random(0), kind, 3):
        said = [{"role": "user", "content": f"{document.text}\n\n{question.question}"}]
        prompt = tokenizer().apply_chat_template(
            said, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        answer = out[0, prompt["input_ids"].shape[1] :]
        assert tokenizer().decode(answer, skip_special_tokens=True) == question.answer
