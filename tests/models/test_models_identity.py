"""Which changes of a model make it another one: every one that changes what it computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import mutants
import pytest
import tinymodels as tiny
import tinytokenizer as tt
import torch
from mutants import Mutant
from transformers import AutoModelForCausalLM

from amcli.errors import UsageError
from amcli.models import weights
from amcli.models.loading import LoadedModel, load
from amkv_format import compare_weights, same_weight

TEXT = "The quick brown fox. Anna owns a lynx, an otter, 42 of them. Who owns a lynx?"


def made(folder: Path, architecture: str) -> Path:
    torch.manual_seed(0)
    config = tiny.config(architecture, vocab_size=330)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tt.of("chatml").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(made(tmp_path_factory.mktemp("llama"), "llama")), device="cpu")


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(made(tmp_path_factory.mktemp("gemma"), "gemma3_text")), device="cpu")


@torch.no_grad()
def computed(loaded: LoadedModel) -> torch.Tensor:
    """Logits of a conversation, in which tokenizer and template have their part."""
    chat = loaded.chat
    ids = chat.open_document(TEXT).ids + chat.first_turn("Who?") + chat.answer_ids("A fox.")
    ids += chat.next_turn("And now?", think=True) + chat.open_document("x", "Be brief.").ids
    logits: torch.Tensor = loaded.model(torch.tensor([ids]), use_cache=False).logits
    return logits


def check(original: LoadedModel, mutant: Mutant, folder: Path) -> None:
    shutil.copytree(original.id, folder)
    mutant.apply(folder)
    mine = original.fingerprint()
    try:
        loaded = load(str(folder), device="cpu")
    except UsageError:
        assert mutant.differs
        return
    found = loaded.differences(mine["model"], mine["tokenizer"])
    assert bool(found) == mutant.differs, found
    before, after = computed(original), computed(loaded)
    same = before.shape == after.shape and torch.equal(before, after)
    if not mutant.differs:
        assert same
    elif not mutant.name.startswith(("merges", "words")):  # what changed may not be in the text
        assert not same


@pytest.mark.parametrize("mutant", list(mutants.every()), ids=lambda mutant: mutant.name)
def test_whatever_computes_something_else_is_refused(
    plain: LoadedModel, mutant: Mutant, tmp_path: Path
) -> None:
    check(plain, mutant, tmp_path / "mutant")


@pytest.mark.parametrize("mutant", mutants.mutants(mutants.WINDOWED, 12), ids=lambda m: m.name)
def test_also_of_a_model_with_windows(
    windowed: LoadedModel, mutant: Mutant, tmp_path: Path
) -> None:
    check(windowed, mutant, tmp_path / "mutant")


# ---- what the numbers are taken from -----------------------------------------------------------


def test_one_number_rounded_in_two_ways_is_the_same() -> None:
    torch.manual_seed(0)
    exact = torch.randn(20000) * 10.0 ** torch.randint(-6, 3, (20000,))
    half = exact.half().float()
    forms = [exact, exact.bfloat16().float(), half]  # loaded in any dtype, from float32
    for a, b in [*product(forms, forms), (half, half.bfloat16().float())]:
        assert all(map(same_weight, a.tolist(), b.tolist()))


def test_the_next_bfloat16_is_another_number() -> None:
    torch.manual_seed(0)
    numbers = torch.cat([torch.randn(5000), 2.0 ** torch.arange(-9, 9)]).bfloat16()
    numbers = numbers[numbers.abs() > 2**-12]
    for step in (-1, 1):
        near = (numbers.view(torch.int16) + step).view(torch.bfloat16)
        for a, b in zip(numbers.tolist(), near.tolist(), strict=True):
            assert not same_weight(a, b)
            assert not same_weight(b, a)
    assert not same_weight(0.0, 1e-3)
    assert not same_weight(0.5, -0.5)
    assert same_weight(0.0, -0.0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_are_the_same_in_every_dtype(stored: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny.config("llama", vocab_size=330, initializer_range=0.02)
    AutoModelForCausalLM.from_config(config, dtype=stored).save_pretrained(tmp_path)
    tt.of("chatml").save_pretrained(tmp_path)
    found = [
        load(str(tmp_path), device="cpu", dtype=name).identity.weights
        for name in ("float32", "bfloat16", "float16")
    ]
    for a in found:
        for b in found:
            compared = compare_weights(a, b)
            assert compared.differing == 0
            assert compared.compared > 700


def test_tied_weights_are_taken_once_and_all_others_too(tmp_path: Path) -> None:
    config = tiny.config("llama", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    found = weights.sample(model)
    assert "model.embed_tokens.weight 97x32" in found
    assert not any(name.startswith("lm_head") for name in found)
    assert len(found["model.layers.*.mlp.up_proj.weight 48x32"]) == 8 * 3 * 22
    del model.model.layers[1]  # each tensor is sampled by its own name
    assert len(weights.sample(model)["model.layers.*.mlp.up_proj.weight 48x32"]) == 8 * 2 * 32


def test_what_is_packed_or_not_in_memory_is_left_out() -> None:
    model = AutoModelForCausalLM.from_config(tiny.config("llama"))
    whole = weights.sample(model)
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False
    )
    model.model.embed_tokens.to("meta")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    part = weights.sample(model)
    assert whole.keys() - part.keys() == {
        "model.embed_tokens.weight 97x32",
        "model.norm.weight 32",
    }
    up = part["model.layers.*.mlp.up_proj.weight 48x32"]
    assert up.startswith("7fc00000" * 22)
    compared = compare_weights(whole, part)
    assert compared.differing == 0
    assert compare_weights(whole, {}).compared == compare_weights(None, whole).compared == 0


def test_many_layers_and_experts_take_milliseconds() -> None:
    """Eighty layers, each with sixty experts that are not joined: 14,400 matrices."""
    model: Any = AutoModelForCausalLM.from_config(tiny.config("llama", num_hidden_layers=80))
    for layer in model.model.layers:
        layer.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(60))
    began = time.perf_counter()
    found = weights.sample(model)
    seconds = time.perf_counter() - began
    assert len(found["model.layers.*.self_attn.q_proj.weight 32x32"]) == 8 * 80
    assert len(found["model.layers.*.experts.*.weight 4x4"]) == 8 * 256
    assert seconds < 1


def test_every_expert_of_joined_ones_gives_numbers() -> None:
    model: Any = AutoModelForCausalLM.from_config(tiny.config("llama", num_hidden_layers=30))
    for layer in model.model.layers:
        layer.experts = torch.nn.Parameter(torch.randn(60, 8, 8))
    before = weights.sample(model)
    assert len(before["model.layers.*.experts 60x8x8"]) == 8 * 30 * (1024 // 30)
    for expert in range(60):
        for layer in model.model.layers:
            layer.experts.data[expert] *= 1.5
        after = weights.sample(model)
        assert compare_weights(before, after).differing
        before = after


SHARDED = """
import json, os, sys
from amcli.models.loading import load
loaded = load("pocket", dtype="float32", device="cpu")
if os.environ["RANK"] == "0":
    json.dump(dict(loaded.identity.weights), open(sys.argv[1], "w"))
"""


def test_processes_that_share_the_heads_find_what_one_finds(tmp_path: Path) -> None:
    (tmp_path / "shard.py").write_text(SHARDED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "shard.py"), str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == dict(load("pocket", dtype="float32", device="cpu").identity.weights)
