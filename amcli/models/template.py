"""Token ids of a conversation whose first user turn opens with the document.

The chat template is rendered with sentinels in place of document, answer and questions, and the
text is cut there. What comes up to the end of the document is the *context*: it is prefilled,
compacted and stored. What comes after goes with each question. Document, questions and template
are tokenised separately, so ids(context) + ids(first turn) is exactly what a full-context baseline
reads; document text is never read as a control token.

A tokenizer without a template gets the plainest form, which base models know:

    document ⏎⏎ Question: … ⏎ Answer: …  ⏎⏎ Question: …
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from amcli.errors import UsageError
from amcli.models.plain import PlainText
from amcli.models.thinking import Marks, Splitter, marks_of

# Plain letters, so that no template trims, splits or escapes them.
_DOCUMENT, _QUESTION, _ANSWER = "AmkvDocumentHere", "AmkvQuestionHere", "AmkvAnswerHere"
_SYSTEM = "AmkvSystemHere"

_JOIN = "\n\n"
_ASKED = "Question:"

# Templates' names for the thinking switch; those that know neither name ignore both.
_SWITCHES = ("enable_thinking", "thinking")

Messages = list[dict[str, Any]]


class OpenedDocument(NamedTuple):
    """The context's `ids`; the document itself is `ids[document_start:document_end]`.

    `boundary` says how the context ends: `in_user_turn`, or `raw` without a template.
    """

    ids: list[int]
    document_start: int
    document_end: int
    boundary: str


class ChatTemplate:
    """A tokenizer's chat template, cut into the pieces a session feeds one after another.

    `stop_ids` end an answer: the model's own end tokens (`eos_token_id`, from its generation
    configuration), the tokenizer's, and the template's end-of-turn token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_id: int | Iterable[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._text = PlainText(tokenizer)
        self.raw = not getattr(tokenizer, "chat_template", None)
        ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        if tokenizer.eos_token_id is not None:
            ends.add(tokenizer.eos_token_id)
        if not self.raw:
            ends.update(self._end_of_turn())
        self.stop_ids = frozenset(ends)

    def open_document(self, text: str, system: str | None = None) -> OpenedDocument:
        """The context: everything up to the end of the document, in the first user turn.

        For a template without a system role, `system` goes in front of the document.
        """
        document = self.plain_ids(text)
        if self.raw:
            start = self._beginning() + ([] if system is None else self.plain_ids(system + _JOIN))
            boundary = "raw"
        else:
            start = self._opening(system)
            boundary = "in_user_turn"
        end = len(start) + len(document)
        return OpenedDocument(start + document, len(start), end, boundary)

    def first_turn(self, question: str, think: bool = False) -> list[int]:
        """What follows the document: the question, the rest of the turn, and the answer's start.

        A lookup in a document does not need long thoughts before every answer: without `think`, a
        template that has a switch for them leaves them out.
        """
        if self.raw:
            return self.plain_ids(f"{_JOIN}{_ASKED} {question}\nAnswer:")
        return self.plain_ids(_JOIN + question) + self._control(self._rest_of_turn(think))

    def next_turn(self, question: str, think: bool = False) -> list[int]:
        """What follows an answer: its end (not yet in the cache), and the next question's turn."""
        if self.raw:
            return self.plain_ids(f"{_JOIN}{_ASKED} {question}\nAnswer:")
        between, _, rest = self._turns(think).partition(_QUESTION)
        return self._control(between) + self.plain_ids(question) + self._control(rest)

    def answer_ids(self, text: str) -> list[int]:
        """An answer as the assistant would write it, without the end of its turn."""
        return self.plain_ids(f" {text}" if self.raw else text)

    @property
    def stop_text(self) -> str | None:
        """What ends an answer without being part of it: without a template, the next question."""
        return f"\n{_ASKED}" if self.raw else None

    def turns(self) -> list[str | None] | None:
        """All that the methods above can take from the template, the same on every day; None
        without a template. Two templates with the same turns are used alike."""
        if self.raw:
            return None
        user = _user(_DOCUMENT + _JOIN + _QUESTION)
        answered = [
            *_user(_DOCUMENT),
            {"role": "assistant", "content": _ANSWER},
            *_user(_QUESTION),
        ]
        found: list[str | None] = []
        for messages in (user, [{"role": "system", "content": _SYSTEM}, *user], answered):
            for think in (False, True):
                try:
                    found.append(self._render(messages, think, dated=False))
                except UsageError:  # no system role
                    found.append(None)
        return [*found, *(self.marks or ())]

    # ---- thoughts ------------------------------------------------------------------------------

    @property
    def marks(self) -> Marks | None:
        """The marks around the model's thoughts; None where the template knows none."""
        return None if self.raw else marks_of(str(self.tokenizer.chat_template))

    @property
    def can_choose_to_think(self) -> bool:
        """Whether thoughts can still be switched on and off after the document has been read."""
        return not self.raw and self._rest_of_turn(True) != self._rest_of_turn(False)

    @property
    def mark_ids(self) -> frozenset[int]:
        """Control tokens that are marks: the text must keep them so that `splitter` sees them."""
        found = {i for mark in self.marks or () for i in self._control(mark)}
        return frozenset(found & control_ids(self.tokenizer))

    def splitter(self, think: bool = False) -> Splitter:
        """A splitter of thoughts and answer for a reply to `first_turn` or `next_turn`."""
        marks = self.marks
        begun = marks is not None and self._rest_of_turn(think).rstrip().endswith(marks.before)
        return Splitter(marks, inside=begun)

    # ---- rendering -----------------------------------------------------------------------------

    def _rest_of_turn(self, think: bool) -> str:
        """The text from the end of the first question to the start of the answer."""
        return _after(self._render(_user(_DOCUMENT + _JOIN + _QUESTION), think), _QUESTION)

    def _opening(self, system: str | None) -> list[int]:
        user = _user(_DOCUMENT + _JOIN + _QUESTION)
        if system is None:
            return self._control(self._render(user).partition(_DOCUMENT)[0])
        try:
            text = self._render([{"role": "system", "content": _SYSTEM}, *user])
        except UsageError:
            text = ""
        before, found, between = text.partition(_DOCUMENT)[0].partition(_SYSTEM)
        if not found:  # no system role, or one that is silently dropped
            return self._opening(None) + self.plain_ids(system + _JOIN)
        return self._control(before) + self.plain_ids(system) + self._control(between)

    def _turns(self, think: bool = False) -> str:
        """The text from the end of one answer to the start of the next, question in between."""
        messages = [
            *_user(_DOCUMENT),
            {"role": "assistant", "content": _ANSWER},
            *_user(_QUESTION),
        ]
        return _after(self._render(messages, think), _ANSWER)

    def _render(self, messages: Messages, think: bool = False, dated: bool = True) -> str:
        """The conversation as text, up to where the assistant would begin to write.

        dated  with today's date where the template has one
        """
        failure: Exception | None = None
        switches: dict[str, Any] = dict.fromkeys(_SWITCHES, think)
        if not dated:
            switches["strftime_now"] = _undated
        for form in (messages, _as_parts(messages)):
            try:
                text = str(
                    self.tokenizer.apply_chat_template(
                        form, tokenize=False, add_generation_prompt=True, **switches
                    )
                )
            except (TemplateError, TypeError, ValueError) as error:
                failure = failure or error
                continue
            if all(text.count(name) == 1 for name in _names(messages)):
                return text
        reason = "it changes or drops what a message says" if failure is None else str(failure)
        raise UsageError(
            f"the model's chat template cannot be split around a document: {reason}",
            "choose an instruction-tuned model with an ordinary chat template",
            code="template-not-divisible",
            field="model",
            reason=reason,
        )

    def _end_of_turn(self) -> set[int]:
        """The control token right after an answer, if the template has one there."""
        ids = self._control(self._turns().partition(_QUESTION)[0].lstrip())
        added = self.tokenizer.added_tokens_decoder
        return {ids[0]} if ids and ids[0] in added and added[ids[0]].special else set()

    # ---- tokenising ----------------------------------------------------------------------------

    def plain_ids(self, text: str) -> list[int]:
        """Ids of outside text: what looks like a control token in it is only text."""
        return self._text.ids(text)

    def _control(self, text: str) -> list[int]:
        """Ids of the template's text, control tokens included."""
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)
        return list(encoded["input_ids"])

    def _beginning(self) -> list[int]:
        """What the tokenizer itself puts before any text, such as a BOS token."""
        bare = self.plain_ids("a")
        full = list(self.tokenizer("a")["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        return []


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that are not text: those that `skip_special_tokens` leaves out."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _undated(form: str) -> str:
    return form


def _user(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def _as_parts(messages: Messages) -> Messages:
    """The form that templates of multimodal models may insist on."""
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _names(messages: Messages) -> list[str]:
    said = "".join(message["content"] for message in messages)
    return [name for name in (_DOCUMENT, _QUESTION, _ANSWER, _SYSTEM) if name in said]


def _after(text: str, sentinel: str) -> str:
    return text.partition(sentinel)[2]
