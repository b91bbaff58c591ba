"""Feeding, sampling and decoding: what a session relies on between two tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tinymodels as tiny
import torch

from amcli.errors import OutOfMemoryError
from amcli.models.generate import absorb, feed, stream
from amcli.models.layer import CompactLayer

PROMPT = tiny.ids(19)[0].tolist()


@pytest.fixture
def loaded() -> SimpleNamespace:
    chat = SimpleNamespace(stop_ids=frozenset())
    return SimpleNamespace(model=tiny.build("qwen3"), chat=chat)


def greedy(n: int) -> list[int]:
    model = tiny.build("qwen3", "eager")
    out = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=n, do_sample=False, eos_token_id=None
    )
    return out[0, len(PROMPT) :].tolist()


def test_greedy_tokens_are_the_models_own(loaded) -> None:
    cache = tiny.empty("qwen3")
    assert list(stream(loaded, cache, PROMPT, max_tokens=15)) == greedy(15)
    assert cache.get_seq_length() == len(PROMPT) + 15


@pytest.mark.parametrize("chunk", [1, 5, 19, 64])
def test_feeding_in_chunks_gives_the_last_logits_only(chunk: int) -> None:
    model, cache = tiny.build("qwen3"), tiny.empty("qwen3")
    got = feed(model, cache, PROMPT, chunk=chunk)
    want = tiny.logits(tiny.build("qwen3", "eager"), torch.tensor([PROMPT]))[0, -1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == len(PROMPT)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "gpt_oss"])
def test_absorbing_fills_the_cache_as_feeding_does(name: str) -> None:
    cache, seen = tiny.empty(name), []
    absorb(tiny.build(name), cache, PROMPT[:-1], chunk=7, advance=seen.append)
    assert seen == [7, 7, 4]
    got = feed(tiny.build(name), cache, PROMPT[-1:])
    want = tiny.logits(tiny.build(name, "eager"), torch.tensor([PROMPT]))[0, -1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_a_stop_token_is_neither_yielded_nor_cached(loaded) -> None:
    want, cache = greedy(15), tiny.empty("qwen3")
    stop = next(token for i, token in enumerate(want) if i > 2 and token not in want[:i])
    got = list(stream(loaded, cache, PROMPT, max_tokens=15, stop_ids={stop}))
    assert got == want[: want.index(stop)]
    assert cache.get_seq_length() == len(PROMPT) + len(got)


def test_stop_tokens_default_to_the_templates(loaded) -> None:
    loaded.chat.stop_ids = frozenset({greedy(1)[0]})
    assert list(stream(loaded, tiny.empty("qwen3"), PROMPT, max_tokens=15)) == []


def test_an_answer_closed_early_leaves_out_its_last_token(loaded) -> None:
    cache = tiny.empty("qwen3")
    tokens = stream(loaded, cache, PROMPT, max_tokens=15)
    got = [next(tokens) for _ in range(4)]
    tokens.close()
    assert cache.get_seq_length() == len(PROMPT) + 3
    rest = list(stream(loaded, cache, got[-1:], max_tokens=3))
    assert got + rest == greedy(7)


def test_seeds_decide_sampled_answers(loaded) -> None:
    def sample(seed: int) -> list[int]:
        cache = tiny.empty("qwen3")
        return list(
            stream(loaded, cache, PROMPT, max_tokens=12, temperature=2.0, seed=seed, stop_ids=set())
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_low_temperature_approaches_greedy(loaded) -> None:
    for seed in range(4):
        cache = tiny.empty("qwen3")
        tokens = stream(loaded, cache, PROMPT, max_tokens=6, temperature=1e-3, seed=seed)
        assert list(tokens) == greedy(6)


def test_sampling_follows_the_tempered_distribution(loaded) -> None:
    logits = feed(loaded.model, tiny.empty("qwen3"), PROMPT)
    want = (logits.double() / 1.5).softmax(-1)
    cache = tiny.empty("qwen3")
    feed(loaded.model, cache, PROMPT[:-1])
    counts = torch.zeros(tiny.VOCAB, dtype=torch.float64)
    n = 300
    for seed in range(n):
        tokens = stream(loaded, cache.fork(), PROMPT[-1:], max_tokens=1, temperature=1.5, seed=seed)
        counts[next(tokens)] += 1
    assert (counts / n - want).abs().max() < 4 * 0.5 / n**0.5


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), torch.OutOfMemoryError("full")])
def test_a_failed_pass_leaves_the_cache_as_it_was(loaded, failure: BaseException) -> None:
    cache = tiny.empty("qwen3")
    feed(loaded.model, cache, PROMPT)

    def fail(index: int, *_: object) -> None:
        if index == 1:
            raise failure

    expected = OutOfMemoryError if isinstance(failure, RuntimeError) else KeyboardInterrupt
    with cache.observe(fail), pytest.raises(expected):
        feed(loaded.model, cache, [5, 6, 7])
    assert [layer.length for layer in cache.layers] == [len(PROMPT)] * 3
    got = feed(loaded.model, cache, [8])
    want = feed(loaded.model, tiny.empty("qwen3"), [*PROMPT, 8])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_an_interrupt_between_two_steps_of_growing_leaves_no_room_taken_for_tokens(
    loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python looks for Ctrl-C whenever a call returns, that of new buffers included."""
    cache = tiny.empty("qwen3")
    feed(loaded.model, cache, PROMPT)
    grow = CompactLayer.set_buffers

    def interrupted(layer: CompactLayer, *args: Any, **options: Any) -> None:
        grow(layer, *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CompactLayer, "set_buffers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            feed(loaded.model, cache, [5] * 70)
    got = feed(loaded.model, cache, [8])
    want = feed(loaded.model, tiny.empty("qwen3"), [*PROMPT, 8])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_feeding_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no token ids"):
        feed(tiny.build("qwen3"), tiny.empty("qwen3"), [])
