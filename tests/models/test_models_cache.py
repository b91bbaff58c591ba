"""The compact cache as the pipeline uses it: fork, truncate, observe, and the guarded link."""

from __future__ import annotations

import pytest
import tinymodels as tiny
import torch
from transformers.cache_utils import DynamicCache

from amcli.entries.ragged import Entries
from amcli.entries.stores import quantizer_of
from amcli.errors import ModelMismatchError
from amcli.models.cache import CompactCache
from amcli.models.calling import GENERATE, run
from amcli.models.geometry import LayerGeometry, ModelGeometry
from amcli.models.layer import CompactLayer

T = 21


def with_prefix(name: str = "qwen3", tokens: torch.Tensor | None = None) -> CompactCache:
    source, cache = tiny.empty(name), tiny.empty(name)
    tiny.logits(tiny.build(name), tiny.ids(T) if tokens is None else tokens, source)
    for i in range(len(cache)):
        keys, values = source.live(i)
        cache.set_prefix(i, Entries.dense(keys[0], values[0]), T)
    return cache


def tokens_of(keys: torch.Tensor) -> list[float]:
    return keys[0, 0, :, 0].tolist()


def filled(window: int | None, *chunks: int) -> CompactLayer:
    """A layer whose keys are the logical positions of their tokens."""
    kind = "full" if window is None else "sliding"
    layer, position = CompactLayer(LayerGeometry(kind, 1, 1, 1, window), 0), 0
    for m in chunks:
        states = torch.arange(position, position + m, dtype=torch.float32).view(1, 1, m, 1)
        layer.update(states, states)
        position += m
    return layer


def test_an_empty_cache_is_truthy_and_has_its_layers() -> None:
    cache = tiny.empty("qwen3")
    assert bool(cache) is True
    assert len(cache) == 3
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0


def test_lengths_and_mask_sizes_count_logical_tokens() -> None:
    cache = with_prefix()
    tiny.logits(tiny.build("qwen3"), tiny.ids(4, seed=1), cache)
    assert cache.get_seq_length() == T + 4
    assert cache.get_mask_sizes(3, 0) == (4 + 3, T)


def test_buffers_grow_by_doubling_and_keep_their_content() -> None:
    layer = filled(None, *[1] * 200)
    assert tokens_of(layer.live()[0]) == list(range(200))
    assert layer.capacity == 256
    assert layer.nbytes == 2 * 200 * 4


def test_a_sliding_layer_returns_what_its_queries_see_and_forgets_the_rest() -> None:
    layer = filled(5, 3, 4)
    state = torch.tensor([7.0, 8.0]).view(1, 1, 2, 1)
    assert tokens_of(layer.update(state, state)[0]) == [3, 4, 5, 6, 7, 8]
    assert tokens_of(layer.live()[0]) == [5, 6, 7, 8]
    long = filled(5, *[1] * 1000)
    assert tokens_of(long.live()[0]) == [996, 997, 998, 999]
    assert long.capacity < 100


def test_truncate_takes_tokens_back_and_the_model_goes_on_as_if_they_never_were() -> None:
    model, cache, question = tiny.build("qwen3"), with_prefix(), tiny.ids(5, seed=1)
    want = tiny.logits(model, question, cache)
    tiny.logits(model, tiny.ids(7, seed=2), cache)
    cache.truncate(T)
    torch.testing.assert_close(tiny.logits(model, question, cache), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [T - 1, T + 6])
def test_truncate_refuses_lengths_it_does_not_hold(length: int) -> None:
    cache = with_prefix()
    tiny.logits(tiny.build("qwen3"), tiny.ids(5), cache)
    with pytest.raises(ValueError, match=f"from {T + 5} to {length}"):
        cache.truncate(length)
    assert cache.get_seq_length() == T + 5


def test_truncate_of_a_sliding_layer_goes_as_far_as_it_remembers() -> None:
    layer = filled(5, 30, 6)
    layer.truncate(30)
    assert tokens_of(layer.live()[0]) == [26, 27, 28, 29]
    forgetful = filled(5, *[1] * 1000)
    with pytest.raises(ValueError, match="cannot go back"):
        forgetful.truncate(100)


def test_a_refused_truncate_leaves_every_layer_alone() -> None:
    layers = (LayerGeometry("full", 1, 1, 1), LayerGeometry("sliding", 1, 1, 1, 5))
    cache = CompactCache.empty(ModelGeometry(layers, (1, 1), None, {}, "none"))
    for layer in cache.layers:
        for _ in range(1000):
            layer.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match="layer 1 cannot go back"):
        cache.truncate(3)
    assert [layer.length for layer in cache.layers] == [1000, 1000]


@pytest.mark.parametrize(("tokens", "left"), [(-2, T + 3), (0, T + 5), (T + 1, T + 1), (99, T + 5)])
def test_crop_follows_both_signatures(tokens: int, left: int) -> None:
    cache = with_prefix()
    tiny.logits(tiny.build("qwen3"), tiny.ids(5), cache)
    cache.crop(tokens)
    assert cache.get_seq_length() == left


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_forks_go_their_own_way_and_share_the_prefix(name: str) -> None:
    model, cache = tiny.build(name), tiny.empty(name)
    tiny.logits(model, tiny.ids(T), cache)
    if name == "qwen3":
        cache = with_prefix()
    tiny.logits(model, tiny.ids(3, seed=1), cache)
    fork, other = cache.fork(), cache.fork()
    alone = cache.fork()
    a, b = tiny.ids(4, seed=2), tiny.ids(6, seed=3)
    want_a, want_b = tiny.logits(model, a, alone), tiny.logits(model, b, cache.fork())
    tiny.logits(model, b, fork)
    torch.testing.assert_close(tiny.logits(model, a, cache), want_a, atol=1e-6, rtol=0)
    torch.testing.assert_close(tiny.logits(model, b, other), want_b, atol=1e-6, rtol=0)
    assert (cache.get_seq_length(), fork.get_seq_length()) == (T + 7, T + 9)
    assert all(x.prefix is y.prefix for x, y in zip(cache.layers, fork.layers, strict=True))


def test_a_fork_survives_truncation_of_the_original() -> None:
    model, cache = tiny.build("qwen3"), with_prefix()
    tiny.logits(model, tiny.ids(5, seed=1), cache)
    want = tiny.logits(model, tiny.ids(3, seed=2), cache.fork())
    fork = cache.fork()
    cache.truncate(T)
    tiny.logits(model, tiny.ids(5, seed=9), cache)
    got = tiny.logits(model, tiny.ids(3, seed=2), fork)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_a_batched_fork_answers_different_questions_at_once() -> None:
    model, cache = tiny.build("qwen3"), with_prefix()
    tiny.logits(model, tiny.ids(2, seed=1), cache)
    questions = tiny.ids(5, seed=2, batch=3)
    got = tiny.logits(model, questions, cache.fork(batch=3))
    want = torch.cat([tiny.logits(model, row[None], cache.fork()) for row in questions])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_another_batch_size_is_refused_by_name(rows: int) -> None:
    cache = with_prefix()
    tiny.logits(tiny.build("qwen3"), tiny.ids(2, batch=2), cache)
    with pytest.raises(ValueError, match="holds 2 sequences"):
        tiny.logits(tiny.build("qwen3"), tiny.ids(2, batch=rows), cache)


def test_beam_search_runs_on_a_prefix() -> None:
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    tokens = torch.cat([tiny.ids(T), tiny.ids(4, seed=1)], dim=1)
    want = tiny.build("qwen3", "eager").generate(tokens, **options)
    got = tiny.build("qwen3").generate(tokens, **{GENERATE: with_prefix()}, **options)
    assert got.tolist() == want.tolist()


def test_observers_see_the_queries_and_may_compact_under_way() -> None:
    """On-policy: each layer's document is replaced before its queries attend."""
    model, cache = tiny.build("qwen3"), tiny.empty("qwen3")
    document, question = tiny.ids(T), tiny.ids(4, seed=1)
    tiny.logits(model, document, cache)
    want = tiny.logits(model, question, cache.fork())
    seen: list[tuple[int, tuple[int, ...], float | None]] = []

    def compact(index, query, layer, scaling, softcap) -> None:
        keys, values = layer.live()
        assert keys.shape[2] == T + 4
        layer.set_prefix(Entries.dense(keys[0, :, :T], values[0, :, :T]), T)
        seen.append((index, tuple(query.shape), scaling))

    with cache.observe(compact):
        got = tiny.logits(model, question, cache)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert seen == [(i, (1, 4, 4, 8), 8**-0.5) for i in range(3)]
    assert cache.live(0)[0].shape[2] == 4
    tiny.logits(model, question, cache)
    assert len(seen) == 3


def test_what_an_observer_stores_is_what_attention_uses() -> None:
    model, cache = tiny.build("qwen3"), with_prefix()
    dropped = Entries.of(torch.empty(0, 8), torch.empty(0, 8), None, (0, 0))
    with cache.observe(lambda i, query, layer, *_: layer.set_prefix(dropped, T)):
        got = tiny.logits(model, tiny.ids(4, seed=1), cache)
    positions = torch.arange(T, T + 4)[None]
    alone = tiny.logits(model, tiny.ids(4, seed=1), position_ids=positions)
    torch.testing.assert_close(got, alone, atol=1e-5, rtol=0)


def test_a_lost_link_raises_instead_of_ignoring_the_prefix() -> None:
    """Another attention function never looks for the layer."""
    with pytest.raises(ModelMismatchError, match="no amkv attention has read") as caught:
        tiny.logits(tiny.build("qwen3", "eager"), tiny.ids(4), with_prefix())
    assert "attn_implementation" in (caught.value.hint or "")


def test_a_copied_key_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    update = CompactCache.update

    def copying(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        return keys.clone(), values

    monkeypatch.setattr(CompactCache, "update", copying)
    with pytest.raises(ModelMismatchError, match="layer 0 stored keys"):
        tiny.logits(tiny.build("qwen3"), tiny.ids(4), with_prefix())


def test_truncate_mends_a_cache_after_an_interrupted_forward_pass() -> None:
    model, cache, question = tiny.build("qwen3"), with_prefix(), tiny.ids(4, seed=1)
    want = tiny.logits(model, question, cache.fork())

    def interrupt(index: int, *_: object) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with cache.observe(interrupt), pytest.raises(KeyboardInterrupt):
        tiny.logits(model, question, cache)
    cache.truncate(T)
    torch.testing.assert_close(tiny.logits(model, question, cache), want, atol=1e-6, rtol=0)


def test_tensors_made_under_inference_mode_can_be_appended_to_outside_of_it() -> None:
    model, cache = tiny.build("qwen3"), tiny.empty("qwen3")
    with torch.inference_mode():
        run(model, cache, tiny.ids(5))
    tiny.logits(model, tiny.ids(3), cache)
    assert cache.get_seq_length() == 8


def test_set_prefix_refuses_what_is_not_this_layers() -> None:
    cache, prefix = tiny.empty("qwen3"), Entries.dense(torch.ones(2, 4, 8), torch.ones(2, 4, 8))
    with pytest.raises(ValueError, match="2 heads of 8"):
        cache.set_prefix(0, Entries.dense(torch.ones(3, 4, 8), torch.ones(3, 4, 8)), 4)
    with pytest.raises(ValueError, match="sliding window"):
        tiny.empty("gemma3_text").set_prefix(0, prefix, 4)
    tiny.logits(tiny.build("qwen3"), tiny.ids(5), cache)
    with pytest.raises(ValueError, match="does not join"):
        cache.set_prefix(0, prefix, 9)
    cache.set_prefix(0, prefix, 3)
    assert cache.live(0)[0].shape[2] == 2
    with pytest.raises(ValueError, match="does not join"):
        cache.set_prefix(0, prefix, 1)


def test_set_live_refuses_gaps_and_never_writes_to_its_source() -> None:
    cache, keys = tiny.empty("qwen3"), torch.ones(2, 6, 8)
    with pytest.raises(ValueError, match="wants 7 tokens, got 6"):
        cache.set_live(0, keys, keys, 7)
    sliding = tiny.empty("gemma3_text")
    with pytest.raises(ValueError, match="wants 6 tokens, got 5"):
        sliding.set_live(0, keys[:, :5], keys[:, :5], 40)
    for i in range(3):
        cache.set_live(i, keys, keys, 6)
    cache.truncate(4)
    tiny.logits(tiny.build("qwen3"), tiny.ids(2), cache)
    assert (keys == 1).all()
    assert cache.get_seq_length() == 6


def test_another_cache_gets_ordinary_attention() -> None:
    model, tokens = tiny.build("qwen3"), tiny.ids(T)
    cache = DynamicCache(config=model.config)
    got = [tiny.logits(model, chunk, cache) for chunk in tokens.split(8, dim=1)]
    want = tiny.logits(tiny.build("qwen3", "eager"), tokens)
    torch.testing.assert_close(torch.cat(got, dim=1), want, atol=1e-4, rtol=0)


def test_reset_forgets_the_prefix_too() -> None:
    cache = with_prefix()
    cache.reset()
    assert cache.get_seq_length() == 0
    want = tiny.logits(tiny.build("qwen3"), tiny.ids(4), tiny.empty("qwen3"))
    got = tiny.logits(tiny.build("qwen3"), tiny.ids(4), cache)
    torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_a_prefix_of_codes_is_a_prefix() -> None:
    numbers = Entries.dense(torch.randn(2, 4, 8), torch.randn(2, 4, 8))
    codes = quantizer_of("int8").pack(numbers)
    cache = tiny.empty("qwen3")
    for i in range(len(cache)):
        cache.set_prefix(i, codes, 9)
    assert cache.get_seq_length() == 9
    assert cache.nbytes() == len(cache) * codes.nbytes == len(cache) * 8 * 2 * (8 + 2)
    narrow = quantizer_of("int8").pack(Entries.dense(torch.ones(2, 4, 6), torch.ones(2, 4, 8)))
    with pytest.raises(ValueError, match="the prefix 2 of 6 and 8"):
        cache.set_prefix(0, narrow, 9)
