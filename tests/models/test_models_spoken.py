"""Tokens as text: whole characters only, and an end where the next question would begin."""

from __future__ import annotations

from typing import Any

import pytest
import tinytokenizer as tt
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from amcli.models.spoken import Ending, Spoken, TextStream, quoted, whole_text
from amcli.models.template import ChatTemplate


def byte_fallback() -> PreTrainedTokenizerFast:
    """As in Llama 2: characters that are not in the vocabulary are written in bytes."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdeno好"]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


TOKENIZERS = {"byte level": tt.make(), "byte fallback": byte_fallback()}
each = pytest.mark.parametrize("kind", TOKENIZERS)


@each
@pytest.mark.parametrize(
    "text", ["plain words", "naïve – “quotes” 漢字 🦊🏽 done", "🦊", "a\n\n b", "你好，这是什么"]
)
def test_text_is_streamed_in_whole_characters_wherever_it_is_cut(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text)["input_ids"]
    for end in range(len(ids) + 1):
        out = TextStream(tokenizer)
        pieces = [out.push(token) for token in ids[:end]] + [out.finish()]
        said = "".join(pieces)
        assert text.startswith(said)
        assert said == whole_text(tokenizer, ids[:end])
        assert "\ufffd" not in "".join(pieces) + quoted(tokenizer, ids[end:])
    assert said == text


@each
def test_an_unfinished_character_is_left_out(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    *head, _ = tokenizer("e🦊")["input_ids"]
    out = TextStream(tokenizer)
    assert "".join(out.push(token) for token in head) == "e"
    assert (out.finish(), out.finish()) == ("", "")


def test_bytes_that_never_become_a_character_do_not_hold_up_the_rest() -> None:
    tokenizer = TOKENIZERS["byte level"]
    *broken, _ = tokenizer("🦊")["input_ids"]
    out = TextStream(tokenizer)
    said = "".join(out.push(token) for token in [*broken, *tokenizer("ab")["input_ids"]])
    assert said.strip("\ufffd") == "ab"


@pytest.mark.parametrize("text", ["\ufffd\n", "\ufffd\n \n"])
def test_a_broken_character_before_held_back_space_is_left_out_too(text: str) -> None:
    ending = Ending(STOP)
    assert ending.push(f"ab{text}") == "ab"
    assert ending.finish(cut=True) == ""
    ending = Ending(STOP)
    assert ending.push(f"ab{text}") + ending.push("c") == f"ab{text}c"


STOP = "\nQuestion:"


def given_out(pieces: list[str], cut: bool = False) -> tuple[list[str], Ending]:
    ending = Ending(STOP)
    out = []
    for piece in pieces:
        out.append(ending.push(piece))
        if ending.found:
            break
    else:
        out.append(ending.finish(cut))
    return out, ending


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["Anna", " ", "\n", "\n\n", "Q", "Question", ":", "ion:", "."])))
def test_no_part_of_the_ending_is_given_out(pieces: list[str]) -> None:
    whole = "".join(pieces)
    out, ending = given_out(pieces)
    before, found, _ = whole.partition(STOP)
    assert ending.found == bool(found)
    assert "".join(out) == (before.rstrip() if found else whole)
    assert ending.given == len("".join(out))
    for n in range(len(out)):  # whatever was given out is part of the reply
        assert before.startswith("".join(out[:n]))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Anna.\n\nQues", "Anna."),
        ("Anna.\n\n", "Anna."),
        ("Anna. Ques", "Anna. Ques"),
        ("Anna.\nQuiet", "Anna.\nQuiet"),
    ],
)
def test_a_reply_that_is_cut_off_leaves_out_what_may_be_the_ending(text: str, left: str) -> None:
    assert "".join(given_out([text], cut=True)[0]) == left
    assert "".join(given_out([text], cut=False)[0]) == text


def spoken(text: str) -> tuple[Spoken, str, Any]:
    tokenizer = tt.make()
    reply = Spoken(tokenizer, ChatTemplate(tokenizer))
    said = ""
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        said += "".join(part.text for part in reply.push(token))
        if reply.ended:
            break
    said += "".join(part.text for part in reply.finish())
    return reply, said, tokenizer


def test_a_model_without_a_template_ends_where_the_next_question_begins() -> None:
    reply, said, tokenizer = spoken(" A lynx.\n\nQuestion: And what else?\nAnswer: Nothing.")
    assert reply.ended
    assert said == " A lynx."
    count, rest = reply.kept()
    assert tokenizer.decode(reply.tokens[:count]) + rest == said
    assert tokenizer.decode(reply.tokens).endswith("Question:")


def test_tokens_that_hold_more_than_the_reply_are_not_kept() -> None:
    tokenizer = tt.make()
    tokenizer.add_tokens([".\n\n"])
    reply = Spoken(tokenizer, ChatTemplate(tokenizer))
    for token in tokenizer("Anna.\n\nQuestion:", add_special_tokens=False)["input_ids"]:
        reply.push(token)
    count, rest = reply.kept()
    assert (tokenizer.decode(reply.tokens[:count]), rest) == ("Anna", ".")


def test_a_template_ends_answers_by_itself() -> None:
    chat = ChatTemplate(tt.of("chatml"))
    assert chat.stop_text is None
    reply = Spoken(chat.tokenizer, chat)
    ids = chat.tokenizer("Anna.\n\nQuestion: Who?", add_special_tokens=False)["input_ids"]
    said = "".join(part.text for token in ids for part in reply.push(token))
    assert said == "Anna.\n\nQuestion: Who?"
    assert reply.kept() == (len(ids), "")
