"""Teacher forcing and generation in batches against the plainest way: one question, no cache."""

from __future__ import annotations

import boxes
import pytest
import torch

from amcli.evaluation import makers
from amcli.evaluation.forcing import as_replied, tokenize
from amcli.evaluation.scorers import chosen_letter, score
from amcli.evaluation.suites.base import Question
from amcli.models.generate import stream
from amcli.models.loading import LoadedModel
from amcli.models.replies import Reply, answers, replies
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.forcing import Forced, Limits, Teacher, end_token
from amcli.pipeline.contexts.reading import prefill

QUESTIONS = [
    Question("Where is it?", "a very long answer that nobody gives", "x"),
    Question("Who has a longer question than the others have, and where, and why?", "yes", "x"),
    Question("Which one? A. this B. that", "B", "x", options=("A", "B")),
]


def plain(context: Context, forced: Forced) -> torch.Tensor:
    """Log-probabilities `[targets, V]` by one forward pass over everything."""
    ids = context.ids + forced.prompt + forced.targets
    logits = context.loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    first = len(context.ids) + len(forced.prompt) - 1
    return logits[first : first + len(forced.targets)].float().log_softmax(-1)


def setting(name: str) -> tuple[Context, list[Forced]]:
    context = prefill(boxes.model(name), boxes.source(150))
    return context, [tokenize(context.loaded, question) for question in QUESTIONS]


@pytest.mark.parametrize("name", ["pocket", "gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_a_batch_gives_what_each_question_gives_alone(name: str) -> None:
    context, forced = setting(name)
    full = makers.whole(context).cache
    found = Teacher(context.loaded, forced, full, Limits()).measure(full)
    for q, outcome in zip(forced, found, strict=True):
        logp = plain(context, q)
        targets = torch.tensor(q.targets)
        nll = -logp.gather(1, targets[:, None]).sum().item()
        assert outcome.nll == pytest.approx(nll, rel=1e-3, abs=1e-3)
        assert outcome.exact == bool((logp.argmax(-1) == targets).all())
        assert (outcome.kl, outcome.agree, outcome.tokens) == (0.0, len(targets), len(targets))
    letters = plain(context, forced[2])[0][forced[2].options]
    assert found[2].choice == int(letters.argmax())


def test_limits_change_memory_and_not_the_numbers() -> None:
    context, forced = setting("pocket")
    full, none = makers.whole(context), makers.nothing(context.loaded, 0)
    results = []
    for limits in (Limits(), Limits(tokens=1, logits=1, kept=0), Limits(kept=4096 * 4 * 12)):
        teacher = Teacher(context.loaded, forced, full.cache, limits)
        results.append([*teacher.measure(full.cache), *teacher.measure(none.cache)])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert theirs.nll == pytest.approx(mine.nll, rel=1e-4, abs=1e-5)
            assert theirs.kl == pytest.approx(mine.kl, rel=1e-4, abs=1e-5)
            assert (theirs.exact, theirs.agree) == (mine.exact, mine.agree)


def greedy(loaded: LoadedModel, context: Context, text: str, most: int) -> list[int]:
    ids = loaded.chat.first_turn(text)
    return list(stream(loaded, context.cache.fork(), ids, max_tokens=most))


@pytest.mark.parametrize("name", ["pocket", "mistral"])
def test_answers_in_lockstep_are_the_answers_one_by_one(name: str) -> None:
    context = prefill(boxes.model(name), boxes.source(150))
    loaded = context.loaded
    texts = ["Who?", "What is the pet of the person who has been here for the longest time?", "Eh"]
    most = [9, 5, 1]
    prompts = [loaded.chat.first_turn(text) for text in texts]
    alone = [greedy(loaded, context, text, n) for text, n in zip(texts, most, strict=True)]
    texts = [str(loaded.tokenizer.decode(ids, skip_special_tokens=True)) for ids in alone]
    decoded = [text.rstrip("\ufffd").strip() for text in texts]  # half a character is left out
    assert answers(loaded, makers.whole(context).cache, prompts, most) == decoded


def test_exact_is_what_greedy_decoding_writes() -> None:
    context = prefill(boxes.model("pocket"), boxes.source(150))
    loaded = context.loaded
    asked = "What is the pet of Vera Kato?"
    said = str(loaded.tokenizer.decode(greedy(loaded, context, asked, 24)))
    full = makers.whole(context).cache
    right, longer = Question(asked, said, "x"), Question(asked, f"{said} or so", "x")
    shorter = Question(asked, said[: len(said) // 2], "x")
    forced = [tokenize(loaded, q) for q in (right, longer, shorter)]
    found = Teacher(loaded, forced, full, Limits()).measure(full)
    assert [outcome.exact for outcome in found] == [True, False, False]


def test_the_end_of_an_answer_is_a_token_where_the_model_has_a_template() -> None:
    loaded = boxes.model("pocket")
    assert end_token(loaded) in loaded.chat.stop_ids
    forced = tokenize(loaded, QUESTIONS[0])
    assert forced.ends
    assert forced.targets[-1] == end_token(loaded)
    text = tokenize(loaded, Question("some more text", "", "x", continuation=True))
    assert not text.ends
    ids = loaded.tokenizer("some more text", add_special_tokens=False)["input_ids"]
    assert text.prompt + text.targets == ids


def test_a_reply_has_its_end_only_where_it_ended() -> None:
    loaded = boxes.model("pocket")
    ids, end = loaded.chat.answer_ids("a red fox"), end_token(loaded)
    prompt = loaded.chat.first_turn(QUESTIONS[0].text)
    ended = as_replied(loaded, QUESTIONS[0], Reply(ids, True, "a red fox"))
    assert (ended.prompt, ended.targets, ended.ends) == (prompt, [*ids, end], True)
    cut = as_replied(loaded, QUESTIONS[0], Reply(ids, False, "a red fox"))
    assert (cut.prompt, cut.targets, cut.ends) == (prompt, ids, False)
    empty = as_replied(loaded, QUESTIONS[0], Reply([], True, ""))
    assert (empty.targets, empty.ends) == ([end], True)
    raw = boxes.model(boxes.RAW)  # no token of a template ends its answers
    ended = as_replied(raw, QUESTIONS[0], Reply([5, 6], True, "x"))
    assert (ended.targets, ended.ends) == ([5, 6], False)
    empty = as_replied(raw, QUESTIONS[0], Reply([], True, ""))
    assert empty.targets[0] in raw.chat.stop_ids
    assert (len(empty.targets), empty.ends) == (1, True)


def test_a_reply_is_forced_as_it_was_generated() -> None:
    context = prefill(boxes.model("pocket"), boxes.source(150))
    loaded, full = context.loaded, makers.whole(context).cache
    prompts = [loaded.chat.first_turn(question.text) for question in QUESTIONS]
    for most in (64, 2):
        said = replies(loaded, full, prompts, [most] * len(prompts))
        assert {reply.ended for reply in said} == {most == 64}
        assert most == 64 or {len(reply.ids) for reply in said} == {2}
        forced = [as_replied(loaded, q, reply) for q, reply in zip(QUESTIONS, said, strict=True)]
        outcomes = Teacher(loaded, forced, full, Limits()).measure(full)
        assert all(outcome.exact for outcome in outcomes)


def test_substrings_count_by_share_and_in_any_case() -> None:
    question = Question("?", "", "x", references=("Alpha", "beta", "gamma", "delta"))
    context, forced = setting("pocket")
    full = makers.whole(context).cache
    [outcome] = Teacher(context.loaded, forced[:1], full, Limits()).measure(full)
    assert score("substring", question, outcome, "ALPHA, and beta.") == 0.5
    assert score("substring", question, outcome, "") == 0.0
    assert score("none", question, outcome, None) is None


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("He says so in the end.\n\nC", "C"),
        ("A dog barks. The answer is D.", "D"),
        ("**B**", "B"),
        ("Option A is wrong.\nAnswer: (C)", "C"),
        ("<think>A or B? B.</think>\n\nA", "A"),
        ("<think>it is B", None),
        ("I cannot tell", None),
        ("Bad Company", None),
    ],
)
def test_the_letter_that_an_answer_settles_on(said: str, letter: str | None) -> None:
    assert chosen_letter(said, ("A", "B", "C", "D")) == letter
