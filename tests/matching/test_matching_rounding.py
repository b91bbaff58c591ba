"""Compaction of entries that will be stored in few bits: what comes back is what will be read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic_heads import heads
from test_matching_layers import errors, run

from amcli.entries.matrix import UnstorableError
from amcli.entries.stores import quantizer_of
from amcli.matching.budgets import LayerShape, entries_for_ratio, stored_bytes, uniform
from amcli.matching.layers import compact_layer, compact_layers
from amcli.matching.methods import LayerInput, get

LENGTHS = [70, 0, 17, 120]
LOST = {"int8": 0.03, "int4": 0.4, "k4v4": 0.3, "k3v2": 0.9}


@pytest.mark.parametrize("store", ["int8", "int4", "k4v4", "k3v2"])
@pytest.mark.parametrize(
    "name", ["omp", "omp-no-bias", "highest-attention", "snapkv", "am-highest-attention", "am-omp"]
)
def test_entries_come_back_as_they_will_be_read(name: str, store: str) -> None:
    quantizer = quantizer_of(store)
    h = heads(H=4, T=120, n=150, dtype=torch.bfloat16)
    h = replace(h, W=torch.ones_like(h.W))
    if name.startswith("am-"):
        fit = get(name).fit
        assert fit is not None
        result = fit(LayerInput(h.sample, h.K, h.V, h.Q.new_zeros(4, 120), LENGTHS), quantizer)
    else:
        result = run(h, name, LENGTHS, rounding=quantizer, fit_limit=32)
    stored = quantizer.pack(result.heads).unpack()
    assert torch.equal(stored.keys.unpack(), result.heads.keys.unpack())
    assert torch.equal(stored.values.unpack(), result.heads.values.unpack())
    mass, output = errors(h, result, h.Q)
    assert result.mass_error.tolist() == pytest.approx(mass, rel=1e-2, abs=1e-4)
    assert result.output_error.tolist() == pytest.approx(output, rel=1e-2, abs=1e-4)
    # The head that keeps every key loses only the rounding.
    assert 0 < result.mass_error[3] < LOST[store]
    assert 0 < result.output_error[3] < LOST[store]


def test_fits_make_up_for_rounded_keys() -> None:
    """Fitted to what is stored, the mass is nearer than when rounding comes after the fit."""
    h = heads(H=6, T=200, n=300)
    h = replace(h, W=torch.ones_like(h.W))
    quantizer = quantizer_of("int4")
    lengths = [40] * 6
    after = run(h, "omp", lengths)
    after = replace(after, heads=quantizer.pack(after.heads).unpack())
    before = run(h, "omp", lengths, rounding=quantizer)
    late, early = errors(h, after, h.Q), errors(h, before, h.Q)
    assert sum(early[0]) < 0.8 * sum(late[0])
    assert sum(early[1]) < sum(late[1])


def test_each_layer_has_a_rounding_of_its_own() -> None:
    """Heads of layers that are stored alike still go together; each is as if it were alone."""
    h = heads(H=3, T=90, n=120)
    layer = LayerInput(h.sample, h.K, h.V, h.K.norm(dim=-1), [70, 20, 90])
    stores = ["k4v4", "native", "int8", "k4v4", "k2v8"]
    roundings = [quantizer_of(store) for store in stores]
    found = dict(compact_layers(get("omp"), [layer] * 5, roundings=roundings))
    for i, rounding in enumerate(roundings):
        alone = compact_layer(get("omp"), layer, rounding=rounding)
        assert torch.equal(found[i].heads.keys.unpack(), alone.heads.keys.unpack())
        # A number halfway between two codes may go to the other one.
        off = found[i].heads.values.unpack() - alone.heads.values.unpack()
        assert float(off.abs().mean()) < 1e-3
        if rounding is not None:
            stored = rounding.pack(found[i].heads).unpack()
            assert torch.equal(stored.keys.unpack(), found[i].heads.keys.unpack())


@pytest.mark.parametrize("lengths", [[20, 70, 90], [20, 90, 1]])
def test_a_number_that_cannot_be_stored_is_traced_to_its_layer(lengths: list[int]) -> None:
    h = heads(H=3, T=90, n=120)
    good = LayerInput(h.sample, h.K, h.V, h.K.norm(dim=-1), [20, 70, 90])
    K = h.K.clone()
    K[1] *= 1e8
    bad = LayerInput(h.sample, K, h.V, good.scores, lengths)
    method, rounding = get("knorm"), quantizer_of("k4v4")
    with pytest.raises(UnstorableError, match="k4v4") as caught:
        list(compact_layers(method, [good, bad, good], roundings=[rounding] * 3))
    assert caught.value.layer == 1


def test_the_ratio_counts_codes_scales_and_biases() -> None:
    quantizer = quantizer_of("int4")
    layers = [LayerShape(2, 1000, 128, 128, 2, packed=quantizer.entry_bytes(128, 128))]
    assert layers[0].entry_bytes() == 64 + 64 + 8 + 8 + 4
    entries = entries_for_ratio(20, layers)
    lengths = uniform(entries, layers)
    ratio = layers[0].full_bytes / stored_bytes(lengths, layers)
    assert 20 <= ratio < 20.2
    assert entries == int(layers[0].full_bytes / 20 / 148)
