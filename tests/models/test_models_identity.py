"""Which changes of a model make it another one: every one that changes what it computes."""

from __future__ import annotations

import shutil
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
