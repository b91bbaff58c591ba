"""What a model takes is known before its weights are read, and what cannot fit is refused then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tinymodels as tiny
import tinytokenizer as tt
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from amcli.errors import OutOfMemoryError
from amcli.models import memory
from amcli.models.loading import load
from amcli.models.memory import Preview

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    model = AutoModelForCausalLM.from_config(tiny.config("qwen3", vocab_size=330))
    model.save_pretrained(folder)
    tt.of("chatml").save_pretrained(folder)
    return folder


def preview(folder: Path, **options: str) -> Preview:
    seen: list[Preview] = []
    load(str(folder), device="cpu", look=seen.append, **options)  # type: ignore[arg-type]
    return seen[0]


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_estimate_is_what_the_loaded_model_takes(saved: Path, dtype: str, size: int) -> None:
    model = load(str(saved), device="cpu", dtype=dtype).model
    need = preview(saved, dtype=dtype).need
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert need.parameters == numbers
    assert need.weights == numbers * size


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text", "gpt_oss", "olmo2"])
def test_a_token_takes_what_the_probe_finds(architecture: str, tmp_path: Path) -> None:
    configuration = tiny.config(architecture, vocab_size=330)
    AutoModelForCausalLM.from_config(configuration).save_pretrained(tmp_path)
    tt.of("chatml").save_pretrained(tmp_path)
    geometry = load(str(tmp_path), device="cpu").geometry
    full = [geometry.layers[i] for i in geometry.full_layers]
    exact = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) * 4 for layer in full)
    assert memory.cache_bytes(configuration, torch.float32) == exact


def test_weights_in_several_files_are_all_counted(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    names, where = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"{i}.safetensors")
        where |= dict.fromkeys(part, f"{i}.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = tiny.config("qwen3", vocab_size=330)
    sharded = memory.estimate(str(tmp_path), None, config, torch.float16, [CPU])
    whole = memory.estimate(str(saved), None, config, torch.float16, [CPU])
    assert sharded.weights == whole.weights
    assert sharded.weights


def test_no_headers_no_claim(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    need = memory.estimate(str(tmp_path), None, tiny.config("qwen3"), torch.float32, [CPU])
    assert (need.weights, need.longest) == (None, None)
    seen = Preview("it", [CPU], torch.float32, need, None, tt.of("chatml"))
    seen.require_weights()
    seen.require_document("doc.txt", "a" * 10**5)
    assert seen.line() == "it in float32 on cpu"


def test_several_devices_and_processes_share_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    config = tiny.config("qwen3", vocab_size=330)
    gpus = [torch.device("cuda", i) for i in range(2)]
    one = memory.estimate(str(saved), None, config, torch.float16, [CPU])
    spread = memory.estimate(str(saved), None, config, torch.float16, gpus)
    divided = memory.estimate(str(saved), None, config, torch.float16, [CPU], processes=2)
    assert (spread.weights, spread.free) == (one.weights, 2 * 10**9)
    assert one.weights is not None
    assert (divided.weights, divided.free) == (one.weights // 2, 10**9 // 2)
    line = Preview("it", gpus, torch.float16, spread, None, tt.of("chatml")).line()
    assert line.startswith("it in float16 on 2 GPUs: ")


def no_weights(*arguments: object, **options: object) -> None:
    raise AssertionError("the weights were read")


def test_weights_that_cannot_fit_are_refused_unread(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_weights)
    with pytest.raises(OutOfMemoryError) as caught:
        load(str(saved), device="cpu")
    assert caught.value.exit_code == 5
    assert "for its weights in float32, and cpu has 10 kB free" in caught.value.message
    assert (caught.value.code, caught.value.field) == ("model-too-large", "model")
    assert "dtype='bfloat16'" in (caught.value.hint or "")


def test_a_document_that_cannot_fit_is_refused_and_its_limit_named(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = preview(saved).need
    assert need.weights is not None
    assert need.per_token is not None
    monkeypatch.setattr(memory, "free_bytes", lambda device: need.weights + 100 * need.per_token)
    found = preview(saved)
    assert "documents of up to 90 tokens fit" in found.line()
    found.require_document("short.txt", "a" * 90)
    with pytest.raises(OutOfMemoryError) as caught:
        found.require_document("long.txt", "Anna owns a lynx. " * 100)
    assert "long.txt has " in caught.value.message
    assert "about 90 tokens" in (caught.value.hint or "")


def test_a_line_says_what_where_and_how_large(saved: Path) -> None:
    line = preview(saved, dtype="bfloat16").line()
    assert line.startswith(f"{saved.resolve()} in bfloat16 on cpu: ")
    assert " free; " in line


def test_linux_says_what_is_free() -> None:
    free = memory.free_bytes(CPU)
    assert free is not None
    assert free > 0
