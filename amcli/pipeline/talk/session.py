"""A conversation about a context: questions in, streamed answers out, over one cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from amcli.errors import UsageError
from amcli.models.cache import Mark
from amcli.models.generate import absorb, stream
from amcli.models.spoken import Spoken
from amcli.models.thinking import Part
from amcli.pipeline.contexts.context import Context

DEFAULT_MAX_TOKENS = 1024


@dataclass
class Turn:
    """A question and its outcome.

    start    logical length of the cache before it
    tokens   tokens of the answer; `seconds` run from the question to the answer's end
    system   the instructions in force, given now or before
    ended    why the answer ended: `stop` (the model's own end or, without a template, the
             beginning of another question), `max-tokens`, `positions`, or `broken-off`
    """

    question: str
    start: int
    system: str | None = None
    answer: str = ""
    thoughts: str = ""
    tokens: int = 0
    seconds: float = 0.0
    ended: str = "broken-off"

    @property
    def speed(self) -> float:
        """Tokens per second, including the time to read the question."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass
class Session:
    """Asks one question after another; each sees the context and the turns before it.

    The context's cache is forked, never changed, so many sessions can share one context.

    system   instructions, put before the next question if they are new
    think    lets the model think first, if its template has a switch for it
    thought  called with pieces of the thoughts, which are not part of the answer
    ids      tokens in the cache after the context
    history  the turns so far; the first `settled` of them are already part of the context
    """

    context: Context
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None
    think: bool = False
    thought: Callable[[str], None] = field(default=lambda text: None)
    history: list[Turn] = field(default_factory=list, init=False)
    settled: int = field(default=0, init=False)
    ids: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.origin = self.context
        self.cache = self.context.cache.fork()
        self._asked = 0

    @property
    def turns(self) -> int:
        """Questions asked so far, without those taken back."""
        return len(self.history)

    @property
    def tokens(self) -> int:
        """Tokens of the last answer."""
        return self.history[-1].tokens if self.history else 0

    @property
    def length(self) -> int:
        """Positions in use: tokens of the context and the conversation."""
        return self.context.T + len(self.ids)

    @property
    def positions(self) -> int | None:
        """Positions that the model has; None: no limit."""
        return self.context.loaded.geometry.max_positions

    def reset(self) -> None:
        """Forgets the conversation, including what was compacted, but not the original context."""
        self.adopt(self.origin, [])
        self.history, self.settled, self._asked = [], 0, 0

    def adopt(self, context: Context, ids: list[int]) -> None:
        """Continues from a context, reading `ids` after it."""
        cache = context.cache.fork()
        if ids:
            absorb(context.loaded.model, cache, ids)
        self.context, self.cache, self.ids = context, cache, ids

    def undo(self) -> Turn:
        """Takes the last turn back. Raises UsageError when there is none to take back."""
        if len(self.history) == self.settled:
            why = "the turns before were compacted" if self.settled else "nothing was asked yet"
            raise UsageError(
                f"there is no turn to take back: {why}", "ask a question", code="no-turn-left"
            )
        turn = self.history[-1]
        ids = self.ids[: turn.start - self.context.T]
        try:
            self.cache.truncate(turn.start)
        except ValueError:  # a sliding layer or a state has moved on: read the rest again
            self.adopt(self.context, ids)
        self.ids = ids
        return self.history.pop()

    def prompt_ids(self, question: str) -> list[int]:
        """What is fed for a question: everything from the end of the cache to the answer."""
        told = self.history[-1].system if self.history else None
        if self.system is not None and self.system != told:
            question = f"{self.system}\n\n{question}"
        if self.ids:
            return self.context.loaded.chat.next_turn(question, self.think)
        return self.context.lead(question, self.think)

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yields the answer piece by piece, in complete characters.

        Raises UsageError for an empty question, or one too long for the model's positions. The
        conversation continues after an answer that is broken off; one broken off before its
        first word leaves no trace.
        """
        question = question.strip()
        if not question:
            raise UsageError(
                "the question is empty", "ask one", code="empty-question", field="question"
            )
        ids = self.prompt_ids(question)
        room = self._room(len(ids))
        limit = self.max_tokens if room is None else min(self.max_tokens, room)
        loaded = self.context.loaded
        spoken = Spoken(loaded.tokenizer, loaded.chat, self.think)
        turn = Turn(question, self.length, self.system)
        found = spoken.tokens
        parts: list[Part] = []
        read = False  # whether the model has read the question
        began = time.perf_counter()
        mark = self.cache.mark()
        seed = self.seed + self._asked
        tokens = stream(
            loaded, self.cache, ids, max_tokens=limit, temperature=self.temperature, seed=seed
        )
        try:
            with closing(tokens):
                for token in tokens:
                    read = True
                    parts = spoken.push(token)
                    if spoken.ended:
                        break
                    yield from self._answered(turn, parts)
                    parts = []
            read = True
            cut = len(found) == limit and not spoken.ended
            parts += spoken.finish(cut)
            found = self._without_rest(turn.start, ids, spoken)
            if not cut:
                turn.ended = "stop"
            else:
                turn.ended = "max-tokens" if limit == self.max_tokens else "positions"
            yield from self._answered(turn, parts)
        finally:
            if read:
                turn.answer = turn.answer.strip()
                turn.tokens, turn.seconds = len(found), time.perf_counter() - began
                fed = self.cache.get_seq_length() - turn.start
                self.ids = self.ids + [*ids, *found][:fed]
                self.history.append(turn)
                self._asked += 1
            else:
                self._take_back(mark)

    def _without_rest(self, start: int, ids: list[int], spoken: Spoken) -> list[int]:
        """The tokens of a reply to `ids`, after taking back what came after it from the cache."""
        count, rest = spoken.kept()
        kept = spoken.tokens[:count]
        if count == len(spoken.tokens):
            return kept
        loaded, length = self.context.loaded, start + len(ids) + count
        try:
            self.cache.truncate(length)
        except ValueError:  # a sliding layer or a state has moved on: read the rest again
            cache = self.context.cache.fork()
            absorb(loaded.model, cache, [*self.ids, *ids, *kept])
            self.cache = cache
        ends = loaded.chat.plain_ids(rest)
        if ends:
            absorb(loaded.model, self.cache, ends)
        return kept + ends

    def _answered(self, turn: Turn, parts: list[Part]) -> Iterator[str]:
        """The parts that belong to the answer; thoughts go to `thought`."""
        for part in parts:
            if part.thought:
                turn.thoughts += part.text
                self.thought(part.text)
            else:
                turn.answer += part.text
                yield part.text

    def _take_back(self, mark: Mark) -> None:
        """Forgets the part of a question read before the reading was broken off."""
        try:
            self.cache.rewind(mark)
        except ValueError:  # a sliding layer has moved on: read the rest again
            self.adopt(self.context, self.ids)

    def _room(self, prompt: int) -> int | None:
        """Positions left for an answer; None: no limit."""
        limit = self.positions
        if limit is None:
            return None
        room = limit - self.length - prompt
        if room < 1:
            raise UsageError(
                f"the model has {limit:,} positions: {self.length:,} are taken, and the question "
                f"needs {prompt:,}",
                "start a new conversation, or ask a shorter question",
                code="question-too-long",
                field="question",
                limit=limit,
                taken=self.length,
                tokens=prompt,
            )
        return room
