"""One ratio, everywhere: that of the compacted layers, and that of all where it is another."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import tinymodels as tiny
import tinytokenizer as tt
import torch
from transformers import AutoModelForCausalLM

from amkv_format import TOKEN_IDS, AmkvFile
from conftest import Amkv


@pytest.fixture
def windows(here: Path) -> Path:
    """A folder with a model with sliding windows, one of two layers."""
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    config = tiny.config(
        "gemma3_text", vocab_size=340, max_position_embeddings=4096, sliding_window=200,
        num_hidden_layers=2, layer_types=layers, head_dim=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained("model")
    tt.of("gemma").save_pretrained("model")
    return Path("model")


def of_all(path: str) -> float:
    with AmkvFile.open(path) as file:
        stored = sum(x.nbytes for name, x in file.tensors.items() if name != TOKEN_IDS)
        return file.full_bytes / stored


@pytest.mark.parametrize("store", ["auto", "native"])
def test_with_windows_the_ratio_of_all_stands_beside(amkv: Amkv, windows: Path, store: str) -> None:
    words = ("compact", "doc.txt", "--model", "./model", "--ratio", "8", "--store", store)
    words += ("--method", "highest-attention", "--budget", "uniform")
    done = amkv(*words, "-o", "doc.amkv", "--json")
    made = json.loads(done.out)
    assert made["ratio"] == pytest.approx(made["full_bytes"] / made["stored_bytes"], rel=1e-4)
    assert made["whole_ratio"] == pytest.approx(of_all("doc.amkv"), rel=1e-4)
    assert made["whole_ratio"] < made["ratio"] - 1
    phrase = f"{made['ratio']:.1f}× smaller ({made['whole_ratio']:.1f}× in all)"
    assert phrase in done.err
    read = json.loads(amkv("inspect", "doc.amkv", "--json").out)
    assert (read["ratio"], read["whole_ratio"]) == (made["ratio"], made["whole_ratio"])
    assert read["whole_ratio"] == pytest.approx(read["full_bytes"] / read["stored_bytes"], rel=1e-4)
    assert phrase in amkv("inspect", "doc.amkv").out
    [listed] = json.loads(amkv("list", "--json").out)["artifacts"]
    assert (listed["ratio"], listed["whole_ratio"]) == (made["ratio"], made["whole_ratio"])
    assert phrase.replace(" smaller", "") in amkv("list").out
    for shown in (done.err, amkv("inspect", "doc.amkv").out):
        assert max(len(line) for line in shown.splitlines() if "in all" in line) <= 80

    assert amkv("prefill", "doc.txt", "--model", "./model").code == 0
    for document in ("doc.txt", "doc.prefill.amkv"):
        asked = (words[0], document, *words[2:], "--plan")
        plan = json.loads(amkv(*asked, "--json").out)
        assert plan["ratio"] == pytest.approx(made["ratio"], rel=0.02)
        assert plan["whole_ratio"] == pytest.approx(made["whole_ratio"], rel=0.02)
        assert f"({plan['whole_ratio']:.1f}× in all)" in amkv(*asked).out


def test_without_windows_there_is_one_ratio(amkv: Amkv, full: Path) -> None:
    done = amkv("compact", full, "--ratio", "8", "--method", "knorm", "--json")
    made = json.loads(done.out)
    assert made["whole_ratio"] == made["ratio"]
    shown = [done.err, *(amkv(*words).out for words in (("inspect", "doc.amkv"), ("list",)))]
    shown.append(amkv("compact", full, "--plan").out)
    assert not [text for text in shown if "in all" in text]


def test_states_of_a_text_are_not_known_before_it_is_read(amkv: Amkv, here: Path) -> None:
    words = ("compact", "doc.txt", "--model", families.folder("qwen3_next"), "--plan", "--json")
    plan = json.loads(amkv(*words).out)
    assert plan["whole_ratio"] is None
