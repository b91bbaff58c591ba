"""RoPE taken from the model: every layout, layers without it, and its mean over positions."""

from __future__ import annotations

from functools import cache

import families
import pytest
import tinymodels as tiny
import torch

from amcli.models.layer import CompactLayer
from amcli.models.rotary import Rotary

SHIFT = 50


@cache
def queries(architecture: str, shift: int) -> dict[int, torch.Tensor]:
    """Each full layer's queries `[Hq, 12, d]` of a text that begins at position `shift`."""
    found: dict[int, torch.Tensor] = {}

    def look(index: int, query: torch.Tensor, layer: CompactLayer, *rest: object) -> None:
        found[index] = query[0]

    model, used = tiny.build(architecture), tiny.empty(architecture)
    places = torch.arange(shift, shift + 12).unsqueeze(0)
    with used.observe(look):
        tiny.logits(model, tiny.ids(12), used, position_ids=places)
    return {i: found[i] for i in tiny.geometry(architecture).full_layers}


@pytest.mark.parametrize("architecture", sorted(set(tiny.ARCHITECTURES) - {"mistral"}))
def test_queries_before_rope_do_not_know_their_position(architecture: str) -> None:
    """Attention depends on distances alone, so a shifted text has the same plain queries."""
    rotary = Rotary(tiny.build(architecture), tiny.geometry(architecture))
    for layer, query in queries(architecture, 0).items():
        shifted = queries(architecture, SHIFT)[layer]
        here, there = torch.arange(12), torch.arange(SHIFT, SHIFT + 12)
        plain = rotary.unrotate(layer, query, here)
        again = rotary.unrotate(layer, shifted, there)
        torch.testing.assert_close(plain, again, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(
            rotary.rotate(layer, plain, there), shifted, atol=2e-3, rtol=1e-3
        )
        turns = architecture not in ("cohere2", "exaone4")  # their full layers have no RoPE
        assert torch.allclose(query, shifted, atol=1e-3) != turns


@pytest.mark.parametrize("architecture", ["llama", "glm4", "gpt_oss", "cohere2"])
def test_the_mean_rotation_is_that_of_the_vectors(architecture: str) -> None:
    rotary = Rotary(tiny.build(architecture), tiny.geometry(architecture))
    layer = tiny.geometry(architecture).full_layers[0]
    places = torch.tensor([3, 40, 41, 200])
    q = torch.randn(8, generator=torch.Generator().manual_seed(0))
    want = torch.stack([rotary.rotate(layer, q[None], p[None])[0] for p in places]).mean(0)
    torch.testing.assert_close(rotary.mean(layer, places, 8) @ q, want)


@pytest.mark.parametrize("name", ["gemma3", "gemma4_text", "persimmon", "phi", "qwen3_next"])
def test_layouts_of_other_families(name: str) -> None:
    """Channels cut off before, one tensor at a time, beside eyes, beside states: `Rotary` checks
    itself against the model's own queries, and what it turns comes back."""
    loaded = families.loaded(name)
    rotary = Rotary(loaded.model, loaded.geometry)
    layer = loaded.geometry.full_layers[0]
    x = torch.randn(2, 3, loaded.geometry.layers[layer].key_dim)
    places = torch.tensor([0, 5, 90])
    turned = rotary.rotate(layer, x, places)
    torch.testing.assert_close(turned[:, 0], x[:, 0], atol=1e-5, rtol=0)
    assert not torch.allclose(turned[:, 1:], x[:, 1:], atol=1e-2)
    torch.testing.assert_close(rotary.unrotate(layer, turned, places), x, atol=1e-4, rtol=0)
