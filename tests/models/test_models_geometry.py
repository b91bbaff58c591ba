"""The probe: what it finds in models that work, and how it refuses those that do not."""

from __future__ import annotations

import pytest
import tinymodels as tiny
import torch
from transformers import AutoModelForCausalLM

from amcli.errors import UsageError
from amcli.models.attention import NAME, register
from amcli.models.geometry import LayerGeometry
from amcli.models.probe import probe

FULL = LayerGeometry("full", 2, 8, 8)
SLIDING = LayerGeometry("sliding", 2, 8, 8, window=7)


def build(architecture: str, **overrides):
    register()
    configuration = tiny.config(architecture, **overrides)
    return AutoModelForCausalLM.from_config(configuration, attn_implementation=NAME).eval()


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen3", (FULL, FULL, FULL)),
        ("mistral", (SLIDING, SLIDING, SLIDING)),
        ("gemma3_text", (SLIDING, FULL, SLIDING)),
        ("gpt_oss", (SLIDING, FULL, SLIDING)),
    ],
)
def test_layers_are_found_by_their_tensors(name: str, layers: tuple[LayerGeometry, ...]) -> None:
    found = tiny.geometry(name)
    assert found.layers == layers
    assert found.query_heads == (4, 4, 4)
    # gpt_oss stretches 4,096 positions 32 times, whatever its configuration is shortened to.
    assert found.max_positions == (131_072 if name == "gpt_oss" else 256)
    assert found.full_layers == tuple(i for i, layer in enumerate(layers) if layer == FULL)


def test_rope_and_architecture_come_along() -> None:
    found = tiny.geometry("qwen3")
    assert found.architecture == "Qwen3ForCausalLM"
    assert found.rope == {"rope_theta": 10000.0, "rope_type": "default"}
    assert set(tiny.geometry("gemma3_text").rope) == {"full_attention", "sliding_attention"}


def test_a_layer_as_a_manifest_has_it() -> None:
    assert SLIDING.manifest() == {
        "type": "sliding",
        "kv_heads": 2,
        "key_dim": 8,
        "value_dim": 8,
        "window": 7,
    }


def test_a_model_that_copies_its_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from amcli.models.cache import CompactCache

    update = CompactCache.update

    def copying(self, *args, **kwargs):
        return tuple(tensor.clone() for tensor in update(self, *args, **kwargs))

    monkeypatch.setattr(CompactCache, "update", copying)
    with pytest.raises(UsageError, match="no amkv attention has read"):
        probe(build("qwen3", num_hidden_layers=1))


def test_dropout_and_4d_masks_are_refused() -> None:
    model = tiny.build("qwen3")
    mask = torch.zeros(1, 1, 4, 4)
    with pytest.raises(NotImplementedError, match="2-D attention_mask"):
        tiny.logits(model, tiny.ids(4), attention_mask=mask)
    training = build("qwen3", attention_dropout=0.1).train()
    with pytest.raises(NotImplementedError, match="dropout"):
        training(input_ids=tiny.ids(4))


def test_packed_sequences_are_refused() -> None:
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(NotImplementedError, match="causal and sliding-window"):
        tiny.build("qwen3")(input_ids=tiny.ids(6), position_ids=packed, use_cache=False)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_the_device_does_wrong_is_not_put_down_to_the_model(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model = tiny.build("llama")

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(type(error)) as caught:
        probe(model)
    assert caught.value is error
