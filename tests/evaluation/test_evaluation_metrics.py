"""Means and intervals against numbers worked out by hand, or known by theory."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from amcli.evaluation.forcing import divergence
from amcli.evaluation.metrics import Record, estimates


def record(score: float | None, nll: float = 0.0, tokens: int = 1, agree: int = 0) -> Record:
    return (score, nll, 2 * nll, agree, tokens)


def test_divergence_of_equal_distributions_is_zero_and_of_others_is_known() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    same = logits.log_softmax(-1)
    assert divergence(same, same).abs().max() == 0
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    known = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(p.log(), q.log()).item() == pytest.approx(known, rel=1e-5)
    other = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    torch.testing.assert_close(
        divergence(same, other),
        torch.nn.functional.kl_div(other, same, reduction="none", log_target=True).sum(-1),
    )


def test_what_is_impossible_in_both_adds_nothing() -> None:
    p = torch.tensor([[1.0, 0.0]]).log()
    assert divergence(p, p).item() == 0
    assert divergence(p, torch.tensor([[0.5, 0.5]]).log()).item() == pytest.approx(math.log(2))


def test_means_are_over_questions_and_over_tokens() -> None:
    found = estimates([[record(1.0, 3.0, 3, 3), record(0.0, 1.0, 1)], [record(0.0, 4.0, 4, 1)]], 0)
    assert found["recall"] is not None
    assert found["recall"].value == pytest.approx(1 / 3)
    assert [found[name].value for name in ("nll", "kl", "agreement")] == [1.0, 2.0, 0.5]  # type: ignore[union-attr]


def test_a_suite_without_scores_has_no_recall() -> None:
    found = estimates([[record(None, 1.0)]], 0)
    assert found["recall"] is None
    assert found["nll"] is not None


def test_no_question_at_all_gives_nothing() -> None:
    assert set(estimates([[], []], 0).values()) == {None}


def test_intervals_are_the_same_for_the_same_seed_only() -> None:
    rng = Random(0)
    groups = [[record(0.0, rng.random()) for _ in range(7)] for _ in range(5)]
    assert estimates(groups, 3) == estimates(groups, 3)
    assert estimates(groups, 3) != estimates(groups, 4)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = Random(1)
    truth, covered, trials = 0.7, 0, 200
    for trial in range(trials):
        groups = [[record(float(rng.random() < truth)) for _ in range(10)] for _ in range(12)]
        found = estimates(groups, trial, resamples=200)["recall"]
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / trials <= 1.0


def test_questions_that_rise_and_fall_with_their_document_widen_the_interval() -> None:
    independent = [[record(float((d + q) % 2)) for q in range(10)] for d in range(10)]
    clustered = [[record(float(d % 2)) for _ in range(10)] for d in range(10)]

    def width(groups: list[list[Record]]) -> float:
        found = estimates(groups, 0)["recall"]
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    assert width(clustered) > 2 * width(independent)


def test_documents_may_differ_in_their_number_of_questions() -> None:
    uneven = [[record(1.0)] * 30, [record(0.0)]]
    found = estimates(uneven, 0)["recall"]
    assert found is not None
    assert found.value == pytest.approx(30 / 31)
    assert (found.low, found.high) == (0.0, 1.0)
