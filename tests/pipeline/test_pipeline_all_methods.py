"""Every registered method, from a document to entries at the ratio that was asked for."""

from __future__ import annotations

import pytest
import torch
from boxes import model, source

from amcli.matching.catalogue import METHODS
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context, full_layers, live_keys
from amcli.pipeline.contexts.reading import prefill

NAMES = [name for name in METHODS if name != "keep"]
# streaming keeps originals too, but turns its keys to the positions they move to.
EVICTING = [
    "random", "knorm", "keydiff", "snapkv", "tova", "h2o", "expected-attention",
    "pyramidkv", "kvzip", "kvzip-uniform",
]  # fmt: skip


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(model("pocket"), source(250))


def run(context: Context, name: str, ratio: float = 8) -> Compaction:
    return compact(context, Request(ratio=ratio, method=name, max_queries=256, seed=1))


@pytest.mark.parametrize("name", NAMES)
def test_the_ratio_is_kept(context: Context, name: str) -> None:
    found = run(context, name)
    assert 8 <= found.ratio < 9
    assert any(t < context.T for heads in found.layers for t in heads.lengths)
    for heads in (layer.unpack() for layer in found.layers):
        assert heads.keys.unpack().isfinite().all()
        assert heads.values.unpack().isfinite().all()
        assert heads.beta is None or heads.beta.isfinite().all()


@pytest.mark.parametrize("name", EVICTING)
def test_evicting_methods_keep_originals(context: Context, name: str) -> None:
    """Each kept entry is one of the document's own, key and value, and none comes twice."""
    found = run(context, name)
    for layer, heads in enumerate(found.layers):
        assert heads.beta is None
        K, V = live_keys(context, layer)
        for h, (keys, values, _) in enumerate(heads.heads()):
            index = [int((K[h] == key).all(1).nonzero()[0]) for key in keys]
            assert len(set(index)) == len(index)
            assert torch.equal(V[h, index], values)


def test_streaming_keeps_sinks_and_the_most_recent(context: Context) -> None:
    found = run(context, "streaming")
    _, V = live_keys(context, 0)
    values = next(iter(found.layers[0].heads()))[1]
    t = len(values)
    wanted = [*range(4), *range(context.T - (t - 4), context.T)]
    assert torch.equal(values, V[0, wanted])


def test_knorm_keeps_the_smallest_keys(context: Context) -> None:
    found = run(context, "knorm")
    K, _ = live_keys(context, 3)
    for h, (keys, _, _) in enumerate(found.layers[3].heads()):
        norms = K[h].norm(dim=1).sort().values
        assert keys.norm(dim=1).max() <= norms[len(keys) - 1] + 1e-5


def test_random_depends_on_the_seed_alone(context: Context) -> None:
    one, again = run(context, "random"), run(context, "random")
    other = compact(context, Request(ratio=8, method="random", seed=2))
    assert torch.equal(one.layers[2].keys.unpack(), again.layers[2].keys.unpack())
    assert not torch.equal(one.layers[2].keys.unpack(), other.layers[2].keys.unpack())


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_other_families_with_sliding_layers(family: str, name: str) -> None:
    context = prefill(model(family), source(40))
    # In 4 bits every key would fit at 4 times: with twice that some have to go.
    found = compact(context, Request(ratio=8, method=name, max_queries=128))
    assert found.ratio >= 8
    full = full_layers(context)
    assert sum(t for i in full for t in found.layers[i].lengths) < len(full) * 2 * context.T
