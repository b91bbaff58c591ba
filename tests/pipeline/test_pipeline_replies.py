"""Replies to many prompts at once: where they end, and what they say."""

from __future__ import annotations

import pytest
import torch
from boxes import model, source

from amcli.evaluation.forcing import as_replied
from amcli.evaluation.suites.base import Question
from amcli.models import replies as module
from amcli.models.replies import Reply, answers, replies
from amcli.pipeline.contexts.reading import prefill

SAID = [
    " Anna.\n\nQuestion: And who else?\nAnswer: Nobody at all, as far as is known of it.",
    " A lynx, an otter and a fox.\n\n\nQuestion:",
    " Nobody",
]


def scripted(monkeypatch: pytest.MonkeyPatch, name: str, said: list[str]) -> list[list[int]]:
    """Makes row i say `said[i]`, whatever is asked; the prompts have the same length."""
    loaded = model(name)
    rows = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
    step = iter(range(1000))

    def choose(logits: torch.Tensor, *_: object) -> torch.Tensor:
        n = next(step)
        return torch.tensor([row[n] if n < len(row) else 40 for row in rows])

    monkeypatch.setattr(module, "_next", choose)
    return rows


def test_without_a_template_replies_end_where_the_next_question_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = prefill(model("raw"), source(60))
    loaded = context.loaded
    rows = scripted(monkeypatch, "raw", SAID)
    prompts = [loaded.chat.first_turn("Who?")] * 3
    steps = []
    monkeypatch.setattr(
        module, "_asking", lambda *a, asking=module._asking: steps.append(1) or asking(*a)
    )
    first, second, third = replies(loaded, context.cache, prompts, [200, 200, len(rows[2])])
    assert (first.text, first.ended) == ("Anna.", True)
    assert (second.text, second.ended) == ("A lynx, an otter and a fox.", True)
    assert (third.text, third.ended) == ("Nobody", False)
    for reply in (first, second):
        whole = loaded.tokenizer.decode([*reply.ids, *reply.end])
        assert whole.startswith(f" {reply.text}")
        assert whole.endswith("\nQuestion:")
        assert loaded.tokenizer.decode(reply.ids).rstrip() == f" {reply.text}"
    assert 0 < len(steps) < 200 // 16  # stopped early


def test_a_reply_that_is_forced_has_to_end_where_it_did() -> None:
    loaded = model("raw")
    question = Question("Who?", "", "x")
    forced = as_replied(loaded, question, Reply([5, 6], True, "x", (7, 8)))
    assert (forced.targets, forced.ends) == ([5, 6, 7, 8], False)
    empty = as_replied(loaded, question, Reply([], True, "", (7, 8)))
    assert empty.targets == [7, 8]


@pytest.mark.parametrize("name", ["raw", "llama"])
def test_replies_leave_out_half_a_character(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = prefill(model(name), source(60))
    prompts = [context.loaded.chat.first_turn("Who?")] * 2
    scripted(monkeypatch, name, ["你好，这", "é 好"])
    assert answers(context.loaded, context.cache, prompts, [8, 4]) == ["你好", "é"]
