"""The judge of captured steps in bfloat16 (`rounded`): it lets rounding pass, and no fault."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import families
import pytest
import torch
from rounded import ROUTED, errors, exact, fed, judge
from test_models_decoding import MIXED, captures, compacted

from amcli.models import decoding
from amcli.models.decoding import Step
from amcli.models.layer import CompactLayer
from amcli.models.loading import load
from amcli.models.seen import Seen
from amcli.pipeline.contexts.context import Context

__all__ = ["captures"]

NAMES = ["llama", "gemma3_text", "qwen3_moe"]


@cache
def context(name: str) -> Context:
    loaded = load(str(families.folder(name)), device="cpu", dtype="bfloat16")
    return compacted(loaded, 3, MIXED)


@cache
def tokens() -> torch.Tensor:
    return torch.randint(3, families.VOCAB, (2, 50), generator=torch.Generator().manual_seed(0))


@cache
def known(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What Python computes, and what it would in float32."""
    graphs, decoding.GRAPHS = decoding.GRAPHS, {}
    try:
        plain, _ = fed(context(name), tokens())
    finally:
        decoding.GRAPHS = graphs
    return plain, exact(name, context(name), tokens())


@pytest.mark.parametrize("name", NAMES)
def test_captured_steps_are_as_good_as_steps_from_python(name: str, captures: None) -> None:
    plain, wanted = known(name)
    found, decoder = fed(context(name), tokens())
    assert decoder.cache.step.graph is not None
    judge(name, found, plain, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exact_has_only_errors_of_rounding(name: str) -> None:
    plain, wanted = known(name)
    assert 1e-3 < errors(plain, wanted).median() < 3e-2


def one_position_on(monkeypatch: pytest.MonkeyPatch) -> None:
    align = Step.align

    def wrong(step: Step, cache: Any) -> None:
        align(step, cache)
        step._counters[:1] += 1

    monkeypatch.setattr(Step, "align", wrong)


def columns_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is put in the place of the one before."""
    launch = Step.launch

    def wrong(step: Step, *arguments: Any) -> Any:
        found = launch(step, *arguments)
        step._counters[1:] -= 1
        return found

    monkeypatch.setattr(Step, "launch", wrong)


def spare_room_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Seen.mask

    def wrong(seen: Seen, tile: Any, device: torch.device) -> torch.Tensor | None:
        found = mask(seen, tile, device)
        return found if seen.at is None or found is None else torch.ones_like(found)

    monkeypatch.setattr(Seen, "mask", wrong)


def the_token_before(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, last = Step.launch, [torch.tensor([[7], [7]])]

    def wrong(step: Step, model: Any, cache: Any, ids: torch.Tensor) -> Any:
        ids, last[0] = last[0], ids.clone()
        return launch(step, model, cache, ids)

    monkeypatch.setattr(Step, "launch", wrong)


def buffers_lose_half_when_they_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tokens late in the answer are wrong."""
    hold = CompactLayer.hold

    def wrong(layer: CompactLayer, capacity: int) -> None:
        hold(layer, capacity)
        if layer.end > 40:
            for tensor in layer.buffers:
                tensor[:, :, : layer.end // 2] = 0

    monkeypatch.setattr(CompactLayer, "hold", wrong)


def one_row_of_two_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Step.launch

    def wrong(step: Step, model: Any, cache: Any, ids: torch.Tensor) -> Any:
        found = launch(step, model, cache, ids).clone()
        found[1] = found[0]
        return found

    monkeypatch.setattr(Step, "launch", wrong)


def now_and_then_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, steps = Step.launch, [0]

    def wrong(step: Step, model: Any, cache: Any, ids: torch.Tensor) -> Any:
        steps[0] += 1
        found = launch(step, model, cache, ids).clone()
        return torch.zeros_like(found) if steps[0] == 30 else found

    monkeypatch.setattr(Step, "launch", wrong)


FAULTS = [
    one_position_on, columns_stand_still, spare_room_is_seen, the_token_before,
    buffers_lose_half_when_they_grow, one_row_of_two_is_wrong,
]  # fmt: skip

TOO_SMALL = {("llama", spare_room_is_seen)}
"""What the zeros of spare room take from sharp attention is less than rounding does; in float32,
where the graphs' tests allow a relative error of 1e-4, it shows."""


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name in NAMES for fault in FAULTS if (name, fault) not in TOO_SMALL],
)
def test_a_fault_is_found(
    name: str,
    fault: Callable[[pytest.MonkeyPatch], None],
    captures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, wanted = known(name)
    fault(monkeypatch)
    found, decoder = fed(context(name), tokens())
    assert decoder.cache.step.graph is not None
    with pytest.raises(AssertionError, match="from the captured step"):
        judge(name, found, plain, wanted)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ROUTED])
def test_a_single_wrong_step_is_found_where_no_expert_can_tip_over(
    name: str, captures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, wanted = known(name)
    now_and_then_nothing(monkeypatch)
    found, _ = fed(context(name), tokens())
    with pytest.raises(AssertionError, match=r"worst: .* first in step 29"):
        judge(name, found, plain, wanted)
