"""One context, several rows: beams, several sequences and batches of questions, by `generate`."""

from __future__ import annotations

from typing import Any

import families
import pytest
import tinymodels as tiny
import torch

from amcli.entries.ragged import Entries
from amcli.models.cache import CompactCache
from amcli.models.calling import GENERATE
from amcli.models.generate import absorb
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.reading import prefill
from amcli.serving.batching import batch_of

T, M = 24, 5

# Full attention, windows that a compact context leaves live, attention sinks, states.
NAMES = ["llama", "gemma3_text", "mistral", "gpt_oss", "qwen3_next", "lfm2", "nemotron_h"]

WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "do_sample": False},
    "every beam": {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
    "sampled": {"num_return_sequences": 3, "do_sample": True},
    "sampled beams": {"num_beams": 2, "do_sample": True},
}

OPTIONS = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


def ids(length: int, seed: int, rows: int = 1) -> torch.Tensor:
    return tiny.ids(length, seed, rows) % 90 + 5


def read(name: str, keep: bool) -> CompactCache:
    """The document in a cache, as it was read or as a compact context that keeps all of it."""
    loaded = families.loaded(name)
    cache = CompactCache.empty(loaded.geometry)
    absorb(loaded.model, cache, ids(T, 0)[0].tolist())
    for i, layer in enumerate(cache.attention):
        if keep and not layer.is_sliding:
            keys, values = cache.live(i)
            cache.set_prefix(i, Entries.dense(keys[0].clone(), values[0].clone()), T)
    return cache


def written(model: Any, tokens: torch.Tensor, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    found: list[list[int]] = model.generate(tokens, **OPTIONS, **options).tolist()
    return found


@pytest.mark.parametrize("keep", [False, True], ids=["prefill", "compact"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_generate_as_with_the_whole_document(name: str, way: str, keep: bool) -> None:
    """For one question, and for a batch of two."""
    model, judge = families.loaded(name).model, families.eager(families.folder(name))
    for questions in (1, 2):
        asked = ids(M, 1, questions)
        tokens = torch.cat([ids(T, 0).expand(questions, -1), asked], dim=1)
        mask = torch.ones_like(tokens)
        want = written(judge, tokens, attention_mask=mask, **WAYS[way])
        given = {GENERATE: read(name, keep), "attention_mask": mask}
        assert written(model, tokens, **given, **WAYS[way]) == want


def test_questions_of_different_lengths() -> None:
    """Padded on the left of each question, behind the document."""
    loaded = families.loaded("llama")
    asked, short = ids(M, 1), ids(M - 2, 2)
    rows = torch.cat([asked, torch.cat([torch.zeros(1, 2, dtype=torch.long), short], dim=1)])
    tokens = torch.cat([ids(T, 0).expand(2, -1), rows], dim=1)
    mask = torch.ones_like(tokens)
    mask[1, T : T + 2] = 0
    for keep in (False, True):
        given = {GENERATE: read("llama", keep), "attention_mask": mask}
        got = written(loaded.model, tokens, num_beams=3, **given)
        for row, question in zip(got, (asked, short), strict=True):
            alone = torch.cat([ids(T, 0), question], dim=1)
            want = written(loaded.model, alone, num_beams=3)
            assert row[T + M :] == want[0][alone.shape[1] :]


def test_beams_over_contexts_of_their_own() -> None:
    loaded = families.loaded("llama")
    one, two = (prefill(loaded, families.DOCUMENT) for _ in range(2))
    compact(one, Request(method="keep", store="native"), errors=False).apply()
    compact(two, Request(ratio=2, method="highest-attention", store="native"), errors=False).apply()
    batch, mask = batch_of([one.cache, two.cache])
    asked = ids(M, 1)
    tokens = torch.cat([torch.tensor([one.ids]), asked], dim=1)
    mask = torch.cat([mask, torch.ones(2, M, dtype=torch.long)], dim=1)
    options = {"num_beams": 2, "num_return_sequences": 2}
    given = {GENERATE: batch, "attention_mask": mask}
    got = written(loaded.model, tokens.expand(2, -1), **given, **options)
    want = []
    for context in (one, two):
        want += written(loaded.model, tokens, **{GENERATE: context.cache.fork()}, **options)
    assert got == want


@pytest.mark.parametrize("keep", [False, True], ids=["prefill", "compact"])
@pytest.mark.parametrize("name", NAMES)
def test_one_row_is_any_number_of_rows(name: str, keep: bool) -> None:
    """Reordered or repeated before it goes on, and shared with the cache it came from."""
    model, original = families.loaded(name).model, read(name, keep)
    asked = ids(M, 1, 3)
    want = tiny.logits(model, asked, original.fork(3))
    forks = [original.fork() for _ in range(3)]
    forks[0].reorder_cache(torch.tensor([2, 0, 1]))
    forks[1].batch_select_indices(torch.tensor([0, 0, 0]))
    forks[2].batch_repeat_interleave(3)
    for fork in (*forks, original.fork()):
        torch.testing.assert_close(tiny.logits(model, asked, fork), want, atol=1e-5, rtol=0)
    again = torch.cat([tiny.logits(model, row[None], original.fork()) for row in asked])
    torch.testing.assert_close(again, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_differ_are_reordered(name: str) -> None:
    model, cache = families.loaded(name).model, read(name, keep=False)
    asked, more = ids(M, 1, 3), ids(1, 2, 3)
    order = torch.tensor([2, 2, 0])
    tiny.logits(model, asked, cache)
    cache.reorder_cache(order)
    got = tiny.logits(model, more, cache)
    for row, source in enumerate(order.tolist()):
        alone = read(name, keep=False)
        tiny.logits(model, asked[source : source + 1], alone)
        want = tiny.logits(model, more[row : row + 1], alone)
        torch.testing.assert_close(got[row : row + 1], want, atol=1e-4, rtol=0)
