"""What a model writes, from tokens to text: whole characters only, thoughts apart, and an end.

Bytes that make no character yet are held back; if the reply ends there, they are left out. Models
without a chat template have no token that ends a turn: they go on to write the next question. So
their replies end where that begins, and what might be its beginning is held back, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from transformers import PreTrainedTokenizerBase

from amcli.models.template import ChatTemplate, control_ids
from amcli.models.thinking import Part, beginning

_NOT_WHOLE = "\ufffd"  # what decoders make of a part of a character
_BYTES = 3  # of a character of four, which may be there without the last


def whole_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, without control tokens, and without half a character at the end."""
    found = ""
    # Some decoders give up a whole run of bytes for one character that is not complete.
    for end in range(len(ids), max(0, len(ids) - _BYTES) - 1, -1):
        text = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
        if not text.endswith(_NOT_WHOLE):
            return max(found, text, key=len)
        found = max(found, text.rstrip(_NOT_WHOLE), key=len)
    return found


def quoted(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens from the middle of a text as text, without half a character at either end."""
    return whole_text(tokenizer, ids).lstrip(_NOT_WHOLE).strip()


class TextStream:
    """Decode tokens one by one into text, holding back bytes that do not yet form a character.

    Control tokens give no text, except for those in `keep`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, keep: AbstractSet[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._dropped = control_ids(tokenizer) - keep
        self._ids: list[int] = []
        self._start = 0  # decoding begins here: some tokenizers drop the first token's space
        self._done = 0  # tokens before this one have been returned

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token in self._dropped:
            return ""
        self._ids.append(token)
        new = self._pending()
        if new.endswith(_NOT_WHOLE):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return new

    def finish(self) -> str:
        """What is left, without an incomplete character."""
        new = self._pending().rstrip(_NOT_WHOLE)
        self._start = self._done = len(self._ids)
        return new

    def _pending(self) -> str:
        given = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start :])[len(given) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def _trimmed(text: str) -> str:
    """A text without white space at its end, and without a broken character before that."""
    return text.rstrip().rstrip(_NOT_WHOLE).rstrip()


class Ending:
    """Ends a reply before a text, and the white space in front of it. Takes pieces of any size.

    found  whether the text has come; nothing may be pushed after that
    given  characters given out so far
    """

    def __init__(self, stop: str | None) -> None:
        self._stop = stop
        self._held = ""
        self.found = False
        self.given = 0

    def push(self, text: str) -> str:
        """The part of the reply that is certain now."""
        if self._stop is None:
            return self._out(text)
        self._held += text
        before, found, _ = self._held.partition(self._stop)
        self.found = bool(found)
        if self.found:
            self._held = ""
            return self._out(before.rstrip())
        body = _trimmed(self._held[: len(self._held) - beginning(self._held, self._stop)])
        self._held = self._held[len(body) :]
        return self._out(body)

    def finish(self, cut: bool) -> str:
        """What was held back, now that the reply is over: if it was `cut` off, not the beginning
        of the text that would have ended it."""
        rest, self._held = self._held, ""
        if cut and self._stop is not None:
            rest = rest[: len(rest) - beginning(rest, self._stop)]
            rest = rest if _trimmed(rest) else ""
        return self._out(rest)

    def _out(self, text: str) -> str:
        self.given += len(text)
        return text


class Spoken:
    """A reply as it comes: tokens in, thoughts and answer out.

    tokens  all that came
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate, think: bool = False
    ) -> None:
        self._text = TextStream(tokenizer, keep=chat.mark_ids)
        self._ending = Ending(chat.stop_text)
        self._splitter = chat.splitter(think)
        self._said = ""
        self._reached: list[int] = []  # characters that were said after each token
        self.tokens: list[int] = []

    @property
    def ended(self) -> bool:
        """Whether the reply is over, because what came after it has begun."""
        return self._ending.found

    def push(self, token: int) -> list[Part]:
        """The parts that are certain after this token."""
        self.tokens.append(token)
        new = self._text.push(token)
        self._said += new
        self._reached.append(len(self._said))
        return self._splitter.push(self._ending.push(new))

    def finish(self, cut: bool = False) -> list[Part]:
        """What was held back, now that no more tokens come; `cut`: although the reply goes on."""
        new = "" if self.ended else self._ending.push(self._text.finish())
        rest = "" if self.ended else self._ending.finish(cut)
        return self._splitter.push(new + rest) + self._splitter.finish()

    def kept(self) -> tuple[int, str]:
        """How many of the first tokens belong to the reply, and what it says beyond them: the
        token that ends a sentence may hold line breaks, too."""
        end = self._ending.given
        if len(self._said) <= end:
            return len(self.tokens), ""
        count = sum(reached <= end for reached in self._reached)
        return count, self._said[self._reached[count - 1] if count else 0 : end]
