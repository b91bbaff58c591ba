"""Batches whose rows have different contexts: each row as if it were alone."""

from __future__ import annotations

import pytest
import tinymodels as tiny
import torch

from amcli.entries.ragged import Entries
from amcli.entries.stores import quantizer_of
from amcli.models.attend import attend
from amcli.models.cache import CompactCache
from amcli.models.calling import GENERATE
from amcli.serving.batching import BatchedPrefix, batch_of


def context(lengths: tuple[int, ...], store: str = "native", biased: bool = True) -> Entries:
    N = sum(lengths)
    beta = torch.randn(N) if biased else None
    heads = Entries.of(torch.randn(N, 8), torch.randn(N, 6), beta, lengths)
    return heads if store == "native" else quantizer_of(store).pack(heads)


@pytest.mark.parametrize("store", ["native", "int8", "int4", "k4v4", "k3v8"])
def test_every_row_attends_over_its_own_context(store: str) -> None:
    torch.manual_seed(0)
    one, two = context((5, 0), store), context((2, 70), store, biased=False)
    parts = [one, two, one]
    query = torch.randn(3, 4, 2, 8)
    keys, values = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 6)
    live = torch.rand(3, 5) > 0.3
    together = attend(query, BatchedPrefix.join(parts), keys, values, live=live)
    for b, part in enumerate(parts):
        row = slice(b, b + 1)
        alone = attend(query[row], part, keys[row], values[row], live=live[row])
        torch.testing.assert_close(together[row], alone, atol=1e-6, rtol=0)


def test_a_context_of_several_rows_is_stored_once() -> None:
    one, two = context((5, 1)), context((2, 9))
    batch = BatchedPrefix.join([one, two, one, one])
    assert batch.nbytes == one.nbytes + two.nbytes
    assert batch.batch == (0, 1, 0, 0)
    assert batch.lengths == (7, 10)
    assert (batch.key_dim, batch.value_dim) == (8, 6)


def test_rows_are_selected_without_copying_entries() -> None:
    one, two = context((5, 1)), context((2, 9))
    batch = BatchedPrefix.join([one, two]).select([1, 1, 0])
    assert batch.batch == (1, 1, 0)
    seen = {tuple(rows): part for part, rows in batch.contexts()}
    torch.testing.assert_close(seen[(0, 1)].keys.unpack(), two.keys.unpack())
    torch.testing.assert_close(seen[(2,)].values.unpack(), one.values.unpack())
    kept = batch.entries.keys.unpack().untyped_storage().data_ptr()
    parts = [part.keys.unpack() for part in seen.values()]
    assert all(x.untyped_storage().data_ptr() == kept for x in parts)


def test_contexts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="stored in one way"):
        BatchedPrefix.join([context((5, 1)), context((5, 1), "int8")])
    with pytest.raises(ValueError, match="of one model"):
        BatchedPrefix.join([context((5, 1)), context((5, 1, 0))])
    with pytest.raises(ValueError, match=r"rows \(0, 2\) of 2 contexts"):
        BatchedPrefix(context((5, 1, 2, 2)), 2, (0, 2))
    with pytest.raises(ValueError, match="3 heads are not contexts of 2"):
        BatchedPrefix(context((5, 1, 2)), 2, (0,))
    keys = torch.randn(2, 2, 1, 8)
    with pytest.raises(ValueError, match="a prefix for 1 rows, queries of 2"):
        attend(torch.randn(2, 2, 1, 8), BatchedPrefix.join([context((5, 1))]), keys, keys[..., :6])


# ---- a model on such a batch ----------------------------------------------------------------


def compact(tokens: torch.Tensor, keep: int, store: str, name: str = "qwen3") -> CompactCache:
    """A context of which each head keeps other tokens than its neighbour."""
    source, cache = tiny.empty(name), tiny.empty(name)
    tiny.logits(tiny.build(name), tokens, source)
    for i in range(len(cache)):
        keys, values = source.live(i)
        kept = [torch.arange(h, tokens.shape[1], 2 + h)[:keep] for h in range(keys.shape[1])]
        heads: Entries = Entries.of(
            torch.cat([keys[0, h, rows] for h, rows in enumerate(kept)]),
            torch.cat([values[0, h, rows] for h, rows in enumerate(kept)]),
            None,
            tuple(len(rows) for rows in kept),
        )
        heads = heads if store == "native" else quantizer_of(store).pack(heads)
        cache.set_prefix(i, heads, tokens.shape[1])
    return cache


def positions(mask: torch.Tensor, m: int) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -m:]


@pytest.fixture(params=["native", "int4", "k4v4"])
def caches(request: pytest.FixtureRequest) -> list[CompactCache]:
    store = request.param
    one, two = compact(tiny.ids(21), 6, store), compact(tiny.ids(13, seed=1), 4, store)
    return [one, two, one]


def test_rows_with_contexts_of_their_own_give_the_logits_of_each_alone(
    caches: list[CompactCache],
) -> None:
    model = tiny.build("qwen3")
    batch, mask = batch_of(caches)
    assert batch.get_seq_length() == 21
    assert mask.sum(1).tolist() == [21, 13, 21]
    assert batch.nbytes() == caches[0].nbytes() + caches[1].nbytes()
    question, more = tiny.ids(4, seed=2, batch=3), tiny.ids(1, seed=3, batch=3)
    got = []
    for tokens in (question, more):
        mask = torch.cat((mask, torch.ones_like(tokens)), dim=1)
        where = positions(mask, tokens.shape[1])
        got.append(tiny.logits(model, tokens, batch, attention_mask=mask, position_ids=where))
    for b, cache in enumerate(caches):
        alone = cache.fork()
        for tokens, logits in zip((question, more), got, strict=True):
            want = tiny.logits(model, tokens[b : b + 1], alone)
            torch.testing.assert_close(logits[b : b + 1], want, atol=2e-5, rtol=0)


def test_questions_of_different_lengths_are_padded_on_the_left(
    caches: list[CompactCache],
) -> None:
    model = tiny.build("qwen3")
    batch, mask = batch_of(caches)
    question = tiny.ids(5, seed=2, batch=3)
    asked = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    mask = torch.cat((mask, asked), dim=1)
    got = tiny.logits(model, question, batch, attention_mask=mask, position_ids=positions(mask, 5))
    for b, cache in enumerate(caches):
        own = question[b : b + 1, 5 - int(asked[b].sum()) :]
        want = tiny.logits(model, own, cache.fork())
        torch.testing.assert_close(got[b, -1], want[0, -1], atol=2e-5, rtol=0)


def test_generate_goes_on_from_every_context(caches: list[CompactCache]) -> None:
    model = tiny.build("qwen3")
    batch, mask = batch_of(caches)
    question = tiny.ids(4, seed=2, batch=3)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}

    def answer(cache: CompactCache, question: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ids = torch.cat((torch.full_like(mask, 5), question), dim=1)
        whole = torch.cat((mask, torch.ones_like(question)), dim=1)
        out = model.generate(ids, attention_mask=whole, **{GENERATE: cache}, **greedy)
        return out[:, ids.shape[1] :]

    got = answer(batch, question, mask)
    for b, cache in enumerate(caches):
        whole = torch.ones(1, cache.get_seq_length(), dtype=torch.long)
        assert torch.equal(got[b : b + 1], answer(cache.fork(), question[b : b + 1], whole))


def test_rows_of_a_batch_can_be_reordered_and_repeated(caches: list[CompactCache]) -> None:
    model = tiny.build("qwen3")
    batch, mask = batch_of(caches)
    batch.batch_select_indices(torch.tensor([1, 0]))
    batch.batch_repeat_interleave(2)
    mask = torch.cat((mask[[1, 1, 0, 0]], torch.ones(4, 3, dtype=torch.long)), dim=1)
    question = tiny.ids(3, seed=2).expand(4, -1)
    got = tiny.logits(model, question, batch, attention_mask=mask, position_ids=positions(mask, 3))
    for rows, cache in ((slice(0, 2), caches[1]), (slice(2, 4), caches[0])):
        want = tiny.logits(model, question[:1], cache.fork()).expand(2, -1, -1)
        torch.testing.assert_close(got[rows], want, atol=2e-5, rtol=0)


def test_caches_that_cannot_be_batched_are_refused(caches: list[CompactCache]) -> None:
    other, talking = tiny.empty("llama"), caches[1].fork()
    tiny.logits(tiny.build("qwen3"), tiny.ids(2), talking)
    with pytest.raises(ValueError, match="one model"):
        batch_of([caches[0], other])
    with pytest.raises(ValueError, match="no token after it"):
        batch_of([caches[0], talking])
    with pytest.raises(ValueError, match="no token after it"):
        batch_of([tiny.empty("qwen3")])
    with pytest.raises(ValueError, match="layer 0 has a sliding window"):
        batch_of([tiny.empty("gemma3_text")])
    with pytest.raises(ValueError, match="stored in one way"):
        batch_of([caches[0], compact(tiny.ids(9), 4, "int8")])
