"""Parts of models that kernels replace, in Triton's interpreter: the same logits in fewer launches.

Everything is put back afterwards.
"""

from __future__ import annotations

import sys

import families
import pytest
import tinymodels as tiny
import torch
from transformers import PreTrainedModel

from amcli.kernels.fused import Fused
from amcli.models import quick as module
from amcli.models.quick import quick, swaps

# Norms (two a layer and the last one, and those of queries and keys), gates, rotations.
FOUND = {"llama": (7, 3, 1), "qwen3": (13, 3, 1), "gemma2": (13, 0, 1), "gemma3_text": (19, 0, 1),
         "olmo2": (13, 3, 1), "gpt_oss": (7, 0, 0), "granite": (7, 3, 1), "glm4": (13, 0, 0),
         "phi3": (7, 0, 1), "cohere2": (0, 3, 0), "mistral": (7, 3, 1)}  # fmt: skip


def interpreter() -> None:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles for the GPU here")


def weighted(model: PreTrainedModel) -> PreTrainedModel:
    """With norms whose weights are not all the same."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", list(FOUND))
def test_a_model_on_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter()
    monkeypatch.setattr(module, "DEVICES", {"cpu"})
    tiny.build.cache_clear()
    model = weighted(tiny.build(name))
    tiny.build.cache_clear()
    ids = tiny.ids(5, batch=2)
    wanted = tiny.logits(model, ids)
    found = swaps(model)
    norms = sum("norm" in type(owner).__name__.lower() for owner, _, _ in found)
    rotations = sum(owner in sys.modules.values() for owner, _, _ in found)
    assert (norms, len(found) - norms - rotations, rotations) == FOUND[name]
    module._swaps[model] = found
    called: list[str] = []
    for kernel in ("norm", "gated", "rotate"):
        real = getattr(module.KERNELS.module(), kernel)
        monkeypatch.setattr(
            module.KERNELS.module(),
            kernel,
            lambda *args, real=real, kernel=kernel: called.append(kernel) or real(*args),
        )
    with quick(model):
        torch.testing.assert_close(tiny.logits(model, ids), wanted, atol=1e-4, rtol=1e-4)
    assert called.count("norm") >= norms
    assert called.count("gated") >= FOUND[name][1]
    assert ("rotate" in called) == bool(rotations)
    called.clear()
    assert torch.equal(tiny.logits(model, ids), wanted)
    assert called == []
    assert module.KERNELS.broken == []


def test_what_others_have_replaced_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter()
    model = tiny.build("llama")
    before = len(swaps(model))
    monkeypatch.setattr(model.model.norm, "forward", lambda x: x)
    assert len(swaps(model)) == before - 1


def test_without_triton_a_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KERNELS", Fused("elementwise", "amcli.kernels.no_such_module"))
    assert swaps(tiny.build("llama")) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [name for name in FOUND if name in families.FAMILIES])
def test_a_model_on_kernels_on_cuda(name: str, dtype: torch.dtype) -> None:
    tiny.build.cache_clear()
    model = weighted(tiny.build(name)).to("cuda", dtype)
    tiny.build.cache_clear()
    ids = tiny.ids(5, batch=2).cuda()
    wanted = tiny.logits(model, ids).float()
    assert len(swaps(model)) == sum(FOUND[name])
    with quick(model):
        found = tiny.logits(model, ids).float()
    error = (found - wanted).norm() / wanted.norm()
    assert error < {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}[dtype]
    assert module.KERNELS.broken == []


def test_norms_that_get_other_weights_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter()
    monkeypatch.setattr(module, "DEVICES", {"cpu"})
    tiny.build.cache_clear()
    model = tiny.build("llama")
    tiny.build.cache_clear()
    ids = tiny.ids(5)
    with quick(model):
        tiny.logits(model, ids)
    for part in model.modules():
        if "norm" in type(part).__name__.lower():
            part.weight = torch.nn.Parameter(torch.linspace(0.5, 2, len(part.weight)))
    wanted = tiny.logits(model, ids)
    with quick(model):
        found = tiny.logits(model, ids)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
