"""Means and intervals against numbers worked out by hand, or known by theory."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from amcli.evaluation.metrics import METRICS, Estimate, Record, estimates
from amcli.pipeline.contexts.forcing import divergence


def record(score: float | None, nll: float = 0.0, tokens: int = 1, agree: int = 0) -> Record:
    sums = {"nll": nll, "kl": 2 * nll, "agree": agree, "tokens": tokens}
    return sums if score is None else {**sums, "score": score}


def lost(kl: float, none_kl: float) -> Record:
    return {**record(None), "kl": kl, "none_kl": none_kl}


def of(groups: list[list[Record]], name: str, seed: int = 0) -> Estimate:
    found = estimates(groups, seed)[name]
    assert found is not None
    return found


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


def test_what_is_lost_is_a_share_of_what_no_context_loses() -> None:
    # Sums over sums, not a mean of the shares 1/2, 1/4 and 2.
    found = of([[lost(1.0, 2.0), lost(1.0, 4.0)], [lost(4.0, 2.0)]], "lost")
    assert found.value == pytest.approx(6 / 8)
    assert of([[lost(0.0, 2.0), lost(0.0, 4.0)]], "lost") == Estimate(0.0, 0.0, 0.0)


def test_the_interval_of_what_is_lost_is_paired_with_no_context() -> None:
    rng = Random(2)
    kls = [[rng.expovariate(1.0) for _ in range(6)] for _ in range(5)]
    same = of([[lost(kl, kl) for kl in group] for group in kls], "lost")
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    # The same share of every question: what is drawn changes nothing, however KLs vary.
    half = of([[lost(kl / 2, kl) for kl in group] for group in kls], "lost")
    assert (half.low, half.high) == (pytest.approx(0.5), pytest.approx(0.5))
    other = of([[lost(rng.random(), kl) for kl in group] for group in kls], "lost")
    assert other.low is not None
    assert other.high is not None
    assert other.low < other.value < other.high


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sum_that_is_not_finite_makes_estimates_that_are_not(bad: float) -> None:
    groups = [[lost(1.0, 2.0), lost(bad, 2.0)], [lost(1.0, 2.0)]]
    for name in ("kl", "lost"):
        found = of(groups, name)
        assert not math.isfinite(found.value)
        assert set(found.record()) == {"value", "low", "high"}
        assert not math.isfinite(found.record()["value"])
    assert of(groups, "nll").record() == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_nothing_to_divide_by_gives_no_number_and_no_error() -> None:
    found = of([[lost(0.0, 0.0), lost(0.0, 0.0)]], "lost")
    assert [math.isnan(v) for v in found.record().values()] == [True, True, True]
    assert of([[lost(1.0, 0.0)]], "lost").value == math.inf
    assert math.isnan(of([[record(None, 0.0, tokens=0)]], "nll").value)


def test_what_some_question_has_no_sum_of_is_not_there() -> None:
    own = {"own_same": 1.0, "own_nll": 1.0, "own_kl": 0.5, "own_agree": 2, "own_tokens": 2}
    found = estimates([[{**lost(1.0, 2.0), **own}, lost(1.0, 2.0)]], 0)
    assert {name for name, value in found.items() if value} == {"nll", "kl", "agreement", "lost"}
    found = estimates([[{**record(None), **own}], [{**record(0.5), **own}]], 0)
    there = {"nll", "kl", "agreement", "same", "own_nll", "own_kl", "own_agreement"}
    assert {name for name, value in found.items() if value} == there
    assert set(found) == set(METRICS)


def test_own_answers_have_their_own_tokens() -> None:
    own = {"own_same": 0.0, "own_nll": 6.0, "own_kl": 3.0, "own_agree": 1, "own_tokens": 4}
    more = {"own_none_kl": 12.0, "f1": 0.5, "contains": 1.0}
    found = estimates([[{**lost(1.0, 2.0), **own, **more}, {**lost(1.0, 2.0), **own, **more}]], 0)
    values = {name: None if e is None else e.value for name, e in found.items()}
    assert values == {
        "recall": None, "nll": 0.0, "kl": 1.0, "agreement": 0.0, "lost": 0.5, "same": 0.0,
        "own_nll": 1.5, "own_kl": 0.75, "own_agreement": 0.25, "own_lost": 0.25,
        "f1": 0.5, "contains": 1.0,
    }  # fmt: skip


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
