"""Pocket's tokenizer, chat template, and documents and dialogues as training tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from amcli.generator import dialogues
from amcli.generator.dialogues import Turn
from amcli.generator.documents import Document, blocks, cut, generate
from amcli.pipeline.queries.prompts import REPEAT, REPEAT_FROM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 4096
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Digits come in pairs, never with a space in front, so that "43-49" is the same three tokens
# everywhere; line breaks are separate tokens, so that blocks tokenize independently.
PATTERN = r"\n+| ?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|[^\S\n]+"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' -}}"
    "{%- if not loop.last or add_generation_prompt -%}{{- '\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def corpus(seed: int, documents: int) -> Iterator[str]:
    """Texts to learn the vocabulary from: documents and dialogues about them."""
    for index in range(documents):
        document = generate(f"tokenizer/{seed}/{index}", 1500)
        yield document.text
        rng = Random(f"tokenizer/{seed}/{index}/turns")
        for _, turn in zip(range(30), dialogues.turns(document, rng), strict=False):
            yield turn.user
            yield turn.assistant
        yield REPEAT
        yield REPEAT_FROM


def train_tokenizer(seed: int = 0, documents: int = 3000) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY` tokens; any text survives a round trip."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, documents), trainer)
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a control token; ValueError if the tokenizer has none of that name."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token}")
    return found


@dataclass(frozen=True)
class Sample:
    """One training sequence: `ids`, a loss weight for each, and where the answers are.

    answers  (kind, first, last + 1) of each answer with its end token, as indices into `ids`
    """

    ids: list[int]
    weights: list[float]
    answers: list[tuple[str, int, int]]


class Sampler:
    """Makes training sequences of at most a given length, each from its own seed."""

    def __init__(self, tokenizer: Tokenizer):
        # A copy, because this changes a setting: "<|im_end|>" in a document has to be text.
        self.tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        self.tokenizer.encode_special_tokens = True
        self.start, self.end = special_id(tokenizer, START), special_id(tokenizer, END)
        self.open_user = [self.start, *self.encode("user\n")]
        self.open_assistant = [*self.encode("\n"), self.start, *self.encode("assistant\n")]
        self.newline = self.encode("\n")
        self.blank = self.encode("\n\n")

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: anything that looks like a control token is only text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def measure(self, texts: list[str]) -> list[int]:
        """Tokens of each text."""
        batch = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(e.ids) for e in batch]

    def _dialogue(self, document: Document, rng: Random, room: int) -> list[Turn]:
        turns: list[Turn] = []
        for turn in dialogues.turns(document, rng):
            room -= (len(turn.user) + len(turn.assistant)) // 3 + 8
            if room < 0:
                break
            turns.append(turn)
        return turns

    def sample(self, seed: str, length: int) -> Sample:
        """A document with a dialogue, or with a repetition, in at most `length` tokens."""
        rng = Random(seed)
        task = rng.random()
        share = 0.47 if task < 0.10 else rng.uniform(0.55, 0.85)
        document = cut(blocks(rng), int(length * share), self.measure, len(self.blank))
        body = self.encode(document.text)
        if task < 0.10:
            turns = [Turn(REPEAT, document.text, dialogues.REPEAT_WEIGHT, "repeat")]
        elif task < 0.20:
            first = rng.randrange(max(1, len(body) - 32))
            part = body[first : first + int(length * (0.95 - share))]
            head = self.tokenizer.decode(part[:12])
            text = self.tokenizer.decode(part)
            user = REPEAT_FROM.format(start=head)
            turns = [Turn(user, text, dialogues.REPEAT_WEIGHT, "repeat", ends=False)]
        else:
            turns = self._dialogue(document, rng, length - len(body) - 16)
        return self.assemble(body, turns, length)

    def assemble(self, body: list[int], turns: list[Turn], length: int) -> Sample:
        """Tokens of a document and its dialogue, exactly as the chat template renders them."""
        ids = [*self.open_user, *body]
        weights = [0.0] * len(self.open_user) + [1.0] * len(body)
        answers: list[tuple[str, int, int]] = []
        for index, turn in enumerate(turns):
            user = self.encode(turn.user)
            if index == 0:
                opening = [*self.blank, *user] if turn.user else []
            else:
                opening = [*self.newline, *self.open_user, *user]
            opening = [*opening, self.end, *self.open_assistant]
            answer = self.encode(turn.assistant) + ([self.end] if turn.ends else [])
            ids += opening
            weights += [0.0] * len(opening)
            answers.append((turn.kind, len(ids), len(ids) + len(answer)))
            ids += answer
            weights += [turn.weight] * len(answer)
        answers = [a for a in answers if a[2] <= length]
        return Sample(ids[:length], weights[:length], answers)
