"""Reference queries and the memo of what the document gives them: found once, kept where asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from synthetic_heads import Heads, heads

from amcli.matching import sample as module
from amcli.matching.layers import compact_layers
from amcli.matching.methods import LayerInput, LayerResult, get
from amcli.matching.sample import Queries, Sample, orders
from amcli.matching.scores import Stats, attention_stats
from amcli.matching.tiles import Logits, Room


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The heads of each pass over a document, as they are made."""
    made: list[int] = []

    def counted(Q: torch.Tensor, *more: torch.Tensor, **options: int) -> Stats:
        made.append(Q.shape[0])
        return attention_stats(Q, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "attention_stats", counted)
    return made


def compacted(h: Heads, sample: Sample, lengths: list[int], room: int = 1) -> LayerResult:
    scores = torch.rand(h.K.shape[:2], generator=torch.Generator().manual_seed(1))
    layer = LayerInput(sample, h.K, h.V, scores, lengths)
    [(_, found)] = compact_layers(get("omp"), [layer], room=Room(1 << 22, room))
    return found


def test_queries_know_what_one_softmax_gives_them() -> None:
    h = heads(H=3, T=40, n=9)
    found = h.asked(logits=Logits(h.scale, 2.0)).of([2, 0])
    for i, head in enumerate((2, 0)):
        S = 2.0 * torch.tanh(h.Q[head].double() @ h.K[head].double().T * h.scale / 2.0)
        torch.testing.assert_close(found.lse[i].double(), S.logsumexp(1), atol=1e-5, rtol=1e-5)
        Y = S.softmax(1) @ h.V[head].double()
        torch.testing.assert_close(found.Y[i].double(), Y, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.weights[i], h.W[head])
    asked = h.asked()
    again = Queries.joined([asked.of([0, 1]), asked.of([2])])
    for name, part in vars(asked).items():
        assert torch.equal(getattr(again, name), part)
    assert bool((h.asked(weighted=False).weights == 1).all())


@pytest.mark.parametrize(
    "broken",
    [
        lambda h: replace(h.asked(), W=h.W[:, :3]),
        lambda h: replace(h.asked(), lse=h.W[:, :3]),
        lambda h: replace(h.asked(), Y=h.V),
        lambda h: Queries.over(h.Q, None, h.K[:1], h.V[:1], h.logits),
        lambda h: Queries.over(h.Q[..., :3], None, h.K, h.V, h.logits),
        lambda h: Queries.joined([h.asked(), h.asked(weighted=False)]),
        lambda h: Sample(h.Q[0], None, h.logits),
        lambda h: Sample(h.Q, h.W[:1], h.logits),
    ],
)
def test_shapes_that_do_not_fit_are_refused(broken: Callable[[Heads], object]) -> None:
    with pytest.raises(ValueError, match=r"queries|masses"):
        broken(heads(T=20, n=8))


@pytest.mark.parametrize("kept", [True, False])
def test_what_the_document_gives_is_found_once_where_it_is_kept(
    kept: bool, passes: list[int]
) -> None:
    h = heads(T=20, n=8)
    sample = Sample(h.Q, h.W, h.logits, kept=kept)
    assert sample.waits is not kept
    first, second = sample.queries(h.K, h.V), sample.queries(h.K, h.V)
    assert len(passes) == (1 if kept else 2)
    assert torch.equal(first.Y, second.Y)
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(0)
        return h.W

    assert sample.once("weights", make) is sample.once("weights", make)
    assert len(made) == (1 if kept else 2)


def test_what_is_known_from_the_start_is_never_looked_for(passes: list[int]) -> None:
    h = heads(T=60, n=40)
    asked = attention_stats(h.Q, h.K, h.V, h.logits)
    sample = Sample(h.Q, h.W, h.logits, truth=asked)
    assert not sample.waits
    found = compacted(h, sample, [9, 5])
    assert passes == []
    assert torch.equal(found.index, compacted(h, h.sample, [9, 5]).index)


@pytest.mark.parametrize("kept", [True, False])
def test_heads_that_wait_are_asked_bucket_by_bucket(kept: bool, passes: list[int]) -> None:
    """In memory for one head, no pass is about more than one; a sample that keeps asks at once."""
    h = heads(H=4, T=60, n=40)
    compacted(h, Sample(h.Q, h.W, h.logits, kept=kept), [9, 5, 0, 60])
    assert passes == ([4] if kept else [1, 1])


def test_a_layer_without_queries_has_nothing_to_find(passes: list[int]) -> None:
    h = heads(T=20, n=8)
    none = Sample(h.K[:, :0], None, h.logits).queries(h.K, h.V)
    assert (none.count, none.lse.shape, none.Y.shape) == (0, (2, 0), (2, 0, 12))
    assert passes == []


def test_samples_together_are_their_queries_one_after_another() -> None:
    h, other = heads(T=20, n=8), heads(T=20, n=5, seed=1)
    both = Sample.joined([h.sample, other.sample])
    assert both.waits
    assert torch.equal(both.Q, torch.cat([h.Q, other.Q], dim=1))
    assert torch.equal(both.weights, torch.cat([h.W, other.W], dim=1))
    alike = Sample(other.Q, None, h.logits)
    half = Sample.joined([h.sample, alike])
    assert torch.equal(half.weights, torch.cat([h.W, torch.ones(2, 5)], dim=1))
    assert Sample.joined([alike, alike]).W is None


def test_orders_are_kept_for_a_search_alone() -> None:
    h = heads(T=20, n=8)
    for nested in (True, False):
        sample = Sample(h.Q, h.W, h.logits, nested=nested)
        sample.remember(0, torch.tensor([7, 3, 5]))
        sample.remember(1, torch.tensor([2, 4]))
        found = orders([(sample, 0), (sample, 1)], [3, 1])
        if nested:
            assert found is not None
            assert found.tolist() == [[7, 3, 5], [2, 4, 0]]
            assert orders([(sample, 1)], [3]) is None
        else:
            assert found is None
