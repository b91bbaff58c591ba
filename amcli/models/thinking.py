"""Separate a reasoning model's thoughts from its answer while the text comes in.

Knows the marks around thoughts, and text in pieces; knows nothing of models.

    splitter = loaded.chat.splitter(think)
    for text in pieces:
        for part in splitter.push(text): …      # part.text, part.thought
    for part in splitter.finish(): …
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Marks(NamedTuple):
    """The marks before and after thoughts."""

    before: str
    after: str


MARKS = (
    Marks("<think>", "</think>"),  # Qwen, DeepSeek, GLM, SmolLM and most others
    Marks("[THINK]", "[/THINK]"),  # Mistral
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
)


def marks_of(template: str) -> Marks | None:
    """The marks that a chat template mentions; None if it mentions none."""
    return next((marks for marks in MARKS if marks.after in template), None)


class Part(NamedTuple):
    """A piece of text, and whether it is a thought."""

    text: str
    thought: bool


class Splitter:
    """Takes a reply in pieces of any size and returns it as thoughts and answer, without the marks.

    What might be the beginning of a mark is held back until that is clear. White space between a
    mark and the text beside it is dropped. Without marks, everything is answer.

    inside  whether the prompt ended inside thoughts, as with templates that open them
    """

    def __init__(self, marks: Marks | None, inside: bool = False) -> None:
        self._marks = marks
        self.inside = inside
        self._held = ""
        self._begun = False  # whether the current part has had any text

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        if self._marks is None:
            return [Part(text, False)] if text else []
        self._held += text
        return [part for part in self._certain(self._marks) if part.text]

    def finish(self) -> list[Part]:
        """What was held back, now that the reply is over. Thoughts may never have ended."""
        rest, self._held = self._held.rstrip() if self.inside else self._held, ""
        return [Part(rest, self.inside)] if rest else []

    def _certain(self, marks: Marks) -> Iterator[Part]:
        while True:
            mark = marks.after if self.inside else marks.before
            before, found, after = self._held.partition(mark)
            if not found:
                break
            yield self._part(before.rstrip())
            self.inside, self._begun, self._held = not self.inside, False, after
        kept = beginning(self._held, mark)
        body = self._held[: len(self._held) - kept]
        if self.inside or not body.strip():  # may turn out to be white space before a mark
            body = body.rstrip()
        self._held = self._held[len(body) :]
        yield self._part(body)

    def _part(self, text: str) -> Part:
        if not self._begun:
            text = text.lstrip()
        self._begun = self._begun or bool(text)
        return Part(text, self.inside)


def beginning(text: str, mark: str) -> int:
    """Number of characters at the end of `text` that might begin a mark."""
    most = min(len(mark) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(mark[:n])), 0)
