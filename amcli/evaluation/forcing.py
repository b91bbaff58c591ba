"""Questions of suites as tokens, for teacher forcing (`contexts.forcing`)."""

from __future__ import annotations

from dataclasses import replace

from amcli.errors import UsageError
from amcli.evaluation.suites.base import Question
from amcli.models.loading import LoadedModel
from amcli.models.replies import Reply
from amcli.pipeline.contexts.forcing import Forced, answered, end_token


def tokenize(loaded: LoadedModel, question: Question) -> Forced:
    """The tokens of a question and its right answer, as in a conversation.

    Raises UsageError when two letters of a multiple choice are one token.
    """
    if question.continuation:
        ids = loaded.chat.plain_ids(question.text)
        return Forced(ids[:1], ids[1:], ends=False)
    chat = loaded.chat
    found = answered(loaded, chat.first_turn(question.text), question.answer)
    # Some tokenizers put a separate space token before the letter.
    options = [chat.answer_ids(letter)[-1] for letter in question.options]
    if len(set(options)) < len(options):
        raise UsageError(
            f"the tokenizer of {loaded.id} cannot tell the options apart",
            code="options-alike",
            field="model",
            model=loaded.id,
        )
    letter = len(found.targets) - 1 - found.ends
    return replace(found, options=options, letter=letter)


def as_replied(loaded: LoadedModel, question: Question, reply: Reply) -> Forced:
    """The tokens of a question and of the model's own reply, with what ended it if it ended: its
    end token or, without a template, the beginning of another question.

    An empty reply is one end token.
    """
    prompt = loaded.chat.first_turn(question.text)
    end = end_token(loaded) if reply.ended else None
    targets = [*reply.ids, *reply.end] if end is None else [*reply.ids, end]
    if not targets:
        return Forced(prompt, [min(loaded.chat.stop_ids)], ends=True)
    return Forced(prompt, targets, end is not None)
