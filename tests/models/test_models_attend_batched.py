"""Batches whose rows have different contexts: each row as if it were alone."""

from __future__ import annotations

import pytest
import torch

from amcli.batched import BatchedPrefix
from amcli.models.attend import attend
from amcli.quantize import QUANTIZERS, Entries
from amcli.ragged import RaggedHeads


def context(lengths: tuple[int, ...], store: str = "native", biased: bool = True) -> Entries:
    N = sum(lengths)
    beta = torch.randn(N) if biased else None
    heads = RaggedHeads(torch.randn(N, 8), torch.randn(N, 6), beta, lengths)
    return heads if store == "native" else QUANTIZERS[store].pack(heads)


@pytest.mark.parametrize("store", ["native", "int8", "int4"])
def test_every_row_attends_over_its_own_context(store: str) -> None:
    torch.manual_seed(0)
    one, two = context((5, 0), store), context((2, 9), store, biased=False)
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
    assert batch.rows == (0, 1, 0, 0)
    assert batch.lengths == (7, 10)
    assert (batch.key_dim, batch.value_dim) == (8, 6)


def test_rows_are_selected_without_copying_entries() -> None:
    one, two = context((5, 1)), context((2, 9))
    batch = BatchedPrefix.join([one, two]).select([1, 1, 0])
    assert batch.rows == (1, 1, 0)
    seen = {tuple(rows): part for part, rows in batch.contexts()}
    torch.testing.assert_close(seen[(0, 1)].unpack().keys, two.unpack().keys)
    torch.testing.assert_close(seen[(2,)].unpack().values, one.unpack().values)
    assert all(
        part.keys.untyped_storage().data_ptr() == batch.entries.keys.untyped_storage().data_ptr()
        for part in seen.values()
    )  # type: ignore[union-attr]


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
