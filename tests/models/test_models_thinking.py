"""Thoughts told from answers, whatever the pieces; and the switch of templates that have one."""

from __future__ import annotations

import pytest
import tinytokenizer as tt
from hypothesis import given
from hypothesis import strategies as st

from amcli.models.spoken import TextStream
from amcli.models.template import ChatTemplate
from amcli.models.thinking import MARKS, Part, Splitter, marks_of

THINK = MARKS[0]


def split(pieces: list[str], splitter: Splitter) -> tuple[str, str]:
    """What was thought and what was answered."""
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.finish()
    assert all(part.text for part in parts)
    thought, answer = (
        "".join(text for text, kind in parts if kind is wanted) for wanted in (True, False)
    )
    return thought, answer


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({min(place, len(text)) for place in places} | {len(text)})
    return [text[i:j] for i, j in zip([0, *ends], ends, strict=False)]


REPLIES = {
    "<think>\nIs it 2 < 3? Yes.\n</think>\n\nYes, 2 < 3.": ("Is it 2 < 3? Yes.", "Yes, 2 < 3."),
    "No thoughts: <thin ice>": ("", "No thoughts: <thin ice>"),
    "<think></think>Done.": ("", "Done."),
    "<think>cut off": ("cut off", ""),
    "": ("", ""),
    "a <": ("", "a <"),
}


@pytest.mark.parametrize("reply", REPLIES)
@given(places=st.lists(st.integers(0, 60), max_size=12))
def test_any_cut_gives_the_same_parts(reply: str, places: list[int]) -> None:
    assert split(cut(reply, places), Splitter(THINK)) == REPLIES[reply]


@given(places=st.lists(st.integers(0, 60), max_size=12))
def test_thoughts_that_the_prompt_has_begun(places: list[int]) -> None:
    reply = "Let me see.\n</think>\n\nA lynx."
    found = split(cut(reply, places), Splitter(THINK, inside=True))
    assert found == ("Let me see.", "A lynx.")


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    splitter = Splitter(THINK)
    assert splitter.push("<think>Let") == [Part("Let", True)]
    assert splitter.push(" me <") == [Part(" me", True)]
    assert splitter.push("b>") == [Part(" <b>", True)]


def test_without_marks_all_is_answer() -> None:
    assert split(["<think>a", "</think>b"], Splitter(None)) == ("", "<think>a</think>b")


@pytest.mark.parametrize("marks", MARKS)
def test_marks_are_found_in_a_template(marks: tuple[str, str]) -> None:
    assert marks_of(f"{{{{ content.split('{marks[1]}')[-1] }}}}") == marks
    assert marks_of("{{ content }}") is None


def test_a_template_with_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tt.of("chatml")
    chat = ChatTemplate(tokenizer)
    assert chat.can_choose_to_think
    assert chat.marks == THINK
    without, thinking = (
        tokenizer.decode(chat.first_turn("Who?", think)) for think in (False, True)
    )
    assert without == thinking + "<think>\n\n</think>\n\n"
    later = tokenizer.decode(chat.next_turn("Who?", True))
    assert "<think>" not in later
    assert not chat.splitter(True).inside
    tokenizer.chat_template = (
        tt.CHATML.partition("{% if enable")[0] + "<think>\n{% endif %}</think>"
    )
    tokenizer.chat_template = tokenizer.chat_template.removesuffix("</think>")
    tokenizer.chat_template += "{# </think> #}"
    always = ChatTemplate(tokenizer)
    assert not always.can_choose_to_think
    assert always.splitter().inside


def test_a_template_without_thoughts() -> None:
    chat = ChatTemplate(tt.of("llama3"))
    assert (chat.marks, chat.can_choose_to_think, chat.mark_ids) == (None, False, frozenset())
    assert split(["Anna."], chat.splitter()) == ("", "Anna.")


def test_marks_that_are_control_tokens_reach_the_splitter() -> None:
    tokenizer = tt.of("chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    tokenizer.chat_template += "{# [/THINK] #}".replace("</think>", "")
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\n\n</think>\n\n", "")
    chat = ChatTemplate(tokenizer)
    ids = tokenizer("[THINK]The lynx<|im_end|>.[/THINK]Anna.", add_special_tokens=False)[
        "input_ids"
    ]
    stream = TextStream(tokenizer, keep=chat.mark_ids)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert split(pieces, chat.splitter(True)) == ("The lynx.", "Anna.")
    plain = TextStream(tokenizer)
    assert "THINK" not in "".join(plain.push(token) for token in ids)
