"""Entries with biases, chunks, padding and half precision: still the model's own attention.

What needs more than one family is run on those that differ in mechanism; that keeping everything
changes nothing is shown for every family in `test_models_families`.
"""

from __future__ import annotations

import copy
import math

import pytest
import tinymodels as tiny
import torch

from amcli.entries.ragged import Entries
from amcli.models.cache import CompactCache
from amcli.models.calling import GENERATE

T, M = 21, 9  # document and question: both longer than the windows of the tiny models
TOLERANCE = 1e-4

each = pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))


def full_context(name: str, tokens: torch.Tensor) -> torch.Tensor:
    return tiny.logits(tiny.build(name, "eager"), tokens)


def twins(prefix: Entries, seed: int) -> Entries:
    """Every key twice with half the weight, shuffled within each head: the same attention."""
    generator = torch.Generator().manual_seed(seed)
    keys, values, lengths = [], [], []
    for K, V, _ in prefix.heads():
        order = torch.randperm(2 * len(K), generator=generator)
        keys.append(K.repeat(2, 1)[order])
        values.append(V.repeat(2, 1)[order])
        lengths.append(2 * len(K))
    beta = torch.full((sum(lengths),), -math.log(2.0))
    return Entries.of(torch.cat(keys), torch.cat(values), beta, tuple(lengths))


def prefilled(name: str, document: torch.Tensor) -> CompactCache:
    cache = tiny.empty(name)
    tiny.logits(tiny.build(name), document, cache)
    return cache


def compacted(name: str, document: torch.Tensor, make=lambda prefix, layer: prefix) -> CompactCache:
    """What a session loads: prefixes in full layers, raw tails in sliding ones."""
    source, cache = prefilled(name, document), tiny.empty(name)
    T = document.shape[1]
    for i, layer in enumerate(cache.geometry.layers):
        keys, values = source.live(i)
        if layer.type == "full":
            cache.set_prefix(i, make(Entries.dense(keys[0], values[0]), i), T)
        else:
            cache.set_live(i, keys[0], values[0], T)
    return cache


@each
def test_chunked_prefill_equals_one_shot(name: str) -> None:
    tokens, cache, model = tiny.ids(T + M), tiny.empty(name), tiny.build(name)
    chunks = [tiny.logits(model, chunk, cache) for chunk in tokens.split([5, 1, 8, 2, 14], dim=1)]
    want = full_context(name, tokens)
    torch.testing.assert_close(torch.cat(chunks, dim=1), want, atol=TOLERANCE, rtol=0)
    assert cache.get_seq_length() == T + M


@each
def test_twice_every_key_with_half_its_weight_equals_full_context(name: str) -> None:
    tokens, model = tiny.ids(T + M), tiny.build(name)
    cache = compacted(name, tokens[:, :T], twins)
    assert cache.get_seq_length() == T
    got = [tiny.logits(model, tokens[:, T : T + 6], cache)]
    got += [tiny.logits(model, tokens[:, i : i + 1], cache) for i in range(T + 6, T + M)]
    want = full_context(name, tokens)[:, T:]
    torch.testing.assert_close(torch.cat(got, dim=1), want, atol=TOLERANCE, rtol=0)


@each
def test_generate_equals_the_models_own_greedy_output(name: str) -> None:
    tokens = tiny.ids(T + M)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = tiny.build(name, "eager").generate(tokens, **options)
    for cache in (tiny.empty(name), compacted(name, tokens[:, :T], twins)):
        got = tiny.build(name).generate(tokens, **{GENERATE: cache}, **options)
        assert got.tolist() == want.tolist()
        assert cache.get_seq_length() == T + M + 11


@each
def test_left_padded_rows_equal_single_rows(name: str) -> None:
    model, long, short = tiny.build(name), tiny.ids(T), tiny.ids(T - 8, seed=3)
    batch = torch.zeros(2, T, dtype=torch.long)
    batch[0], batch[1, 8:] = long, short
    mask = (torch.arange(T) >= torch.tensor([[0], [8]])).long()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    got = model.generate(
        batch, attention_mask=mask, **{GENERATE: tiny.empty(name)}, **options
    ).logits
    for row, tokens in enumerate((long, short)):
        want = tiny.build(name, "eager").generate(tokens, **options).logits
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], atol=TOLERANCE, rtol=0)


def test_padding_between_a_shared_prefix_and_the_questions() -> None:
    document, long, short = tiny.ids(T), tiny.ids(M, seed=4), tiny.ids(M - 3, seed=5)
    cache = compacted("qwen3", document, twins).fork(batch=2)
    batch = torch.zeros(2, M, dtype=torch.long)
    batch[0], batch[1, 3:] = long, short
    mask = torch.ones(2, T + M, dtype=torch.long)
    mask[1, T : T + 3] = 0
    positions = mask.cumsum(-1)[:, T:] - 1
    model = tiny.build("qwen3")
    got = tiny.logits(model, batch, cache, attention_mask=mask, position_ids=positions)
    for row, question in enumerate((long, short)):
        want = full_context("qwen3", torch.cat([document, question], dim=1))
        torch.testing.assert_close(got[row, -1], want[0, -1], atol=TOLERANCE, rtol=0)


def test_padding_inside_the_prefix_is_refused() -> None:
    cache = compacted("qwen3", tiny.ids(T))
    mask = torch.ones(1, T + M, dtype=torch.long)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="compact prefix stands for"):
        tiny.logits(tiny.build("qwen3"), tiny.ids(M), cache, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss"])
def test_half_precision_costs_no_more_than_the_models_own_attention(
    name: str, dtype: torch.dtype
) -> None:
    tokens = tiny.ids(T + M)
    exact = full_context(name, tokens)[:, T:]
    own = tiny.logits(copy.deepcopy(tiny.build(name, "eager")).to(dtype), tokens)[:, T:]
    source, cache = compacted(name, tokens[:, :T], twins), tiny.empty(name)
    for i, layer in enumerate(source.layers):
        keys, values = layer.live()
        if layer.prefix is not None:
            cache.set_prefix(i, layer.prefix.to("cpu", dtype), T)
        else:
            cache.set_live(i, keys[0].to(dtype), values[0].to(dtype), T)
    got = tiny.logits(copy.deepcopy(tiny.build(name)).to(dtype), tokens[:, T:], cache)
    assert got.dtype == dtype
    assert (got - exact).square().mean() < 2 * (own - exact).square().mean()
