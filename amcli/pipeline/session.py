"""A conversation about a context: questions in, streamed answers out, over one cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from amcli.errors import UsageError
from amcli.models.cache import Mark
from amcli.models.generate import TextStream, stream
from amcli.pipeline.contexts import Context

DEFAULT_MAX_TOKENS = 1024


@dataclass
class Session:
    """Asks one question after another; each sees the context and the turns before it.

    The context's cache is forked, never changed, so many sessions may share one context.
    """

    context: Context
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    seed: int = 0
    turns: int = 0
    tokens: int = field(default=0, init=False)
    """Tokens of the last answer."""

    def __post_init__(self) -> None:
        self.cache = self.context.cache.fork()

    def reset(self) -> None:
        """Forgets the conversation, not the context."""
        self.cache = self.context.cache.fork()
        self.turns = 0

    def prompt_ids(self, question: str) -> list[int]:
        """What is fed for a question: it leads from where the cache ends to the answer."""
        chat = self.context.loaded.chat
        if self.turns == 0 and self.context.boundary != "turn_closed":
            return chat.first_turn(question)
        return chat.next_turn(question)

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer piece by piece, each piece complete characters.

        Raises UsageError for an empty question, or one that the model's positions cannot take.
        A conversation goes on after an answer that was broken off; one that was broken off
        before its first word leaves no trace.
        """
        if not question.strip():
            raise UsageError("the question is empty", "type a question")
        ids = self.prompt_ids(question.strip())
        room = self._room(len(ids))
        text = TextStream(self.context.loaded.tokenizer)
        self.tokens = 0
        read = False  # whether the model has read the question
        start = self.cache.mark()
        try:
            for token in stream(
                self.context.loaded,
                self.cache,
                ids,
                max_tokens=min(self.max_tokens, room),
                temperature=self.temperature,
                seed=self.seed + self.turns,
            ):
                read = True
                self.tokens += 1
                if piece := text.push(token):
                    yield piece
            read = True
            if piece := text.finish():
                yield piece
        finally:
            if read:
                self.turns += 1
            else:
                self._take_back(start)

    def _take_back(self, start: Mark) -> None:
        """Forgets the part of a question that was read before the reading was broken off."""
        try:
            self.cache.rewind(start)
        except ValueError:  # a sliding layer has moved on: all that is left is to start over
            self.reset()

    def _room(self, prompt: int) -> int:
        """Positions left for an answer."""
        limit = self.context.loaded.geometry.max_positions
        if limit is None:
            return self.max_tokens
        room = limit - self.cache.get_seq_length() - prompt
        if room < 1:
            raise UsageError(
                f"the conversation has reached the model's {limit:,} positions",
                "start a new conversation, or ask a shorter question",
            )
        return room
