"""Replies to many prompts at once, each right after the same context and with its own end.

Prompts differ in length, and padding in front of them would shift a sliding window. So all rows
advance in lockstep: a row still in its prompt takes its next token from the prompt, any other row
the token it generated. That is exact for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from amcli.models.cache import CompactCache
from amcli.models.calling import run
from amcli.models.decoding import Decoder, Step
from amcli.models.loading import LoadedModel
from amcli.models.spoken import Ending, whole_text

ROWS = 32
"""Prompts answered at a time."""

_LOOK = 16  # steps between checks for all rows being done: each check waits for the device


@dataclass(frozen=True)
class Reply:
    """One reply.

    ids    its tokens, without a stop token
    ended  whether it ended by itself
    text   what it says, in whole characters
    end    without a chat template, the tokens after `ids` that begin the next question
    """

    ids: list[int]
    ended: bool
    text: str
    end: tuple[int, ...] = ()


def answers(
    loaded: LoadedModel,
    cache: CompactCache,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    **options: Any,
) -> list[str]:
    """The text of each reply; arguments and `options` as for `replies`."""
    return [reply.text for reply in replies(loaded, cache, prompts, max_tokens, **options)]


def replies(
    loaded: LoadedModel,
    cache: CompactCache,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    rows: int = ROWS,
    advance: Callable[[int], None] = lambda prompts: None,
) -> list[Reply]:
    """The reply to each prompt after a context; the text leaves out control tokens.

    prompts      token ids, each fed right after the context
    max_tokens   longest reply to each
    temperature  0: the likeliest token each time; above: sampled, the same for the same seed,
                 device and `rows`
    advance      called with the number of prompts answered since the last call
    """
    found: dict[int, Reply] = {}
    generator = torch.Generator(device=loaded.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    steps: list[Step] = []  # what one batch captured and the next may use
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        limits = [max_tokens[i] for i in batch]
        given = [list(prompts[i]) for i in batch]
        tokens = _lockstep(loaded, cache, given, limits, temperature, generator, steps)
        for i, (ids, ended) in zip(batch, tokens, strict=True):
            found[i] = _reply(loaded, ids, ended)
        advance(len(batch))
    return [found[i] for i in range(len(prompts))]


def _reply(loaded: LoadedModel, ids: list[int], ended: bool) -> Reply:
    """A reply of tokens that came before a stop token (`ended`) or the limit."""
    tokenizer, stop = loaded.tokenizer, loaded.chat.stop_text
    ending = Ending(stop)
    text = ending.push(whole_text(tokenizer, ids))
    if stop is None or not ending.found:
        return Reply(ids, ended, (text + ending.finish(cut=not ended)).strip())
    heads = [whole_text(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
    said = next(n for n, head in enumerate(heads) if head.startswith(text))
    over = next(n for n, head in enumerate(heads) if stop in head)
    return Reply(ids[:said], True, text.strip(), tuple(ids[said:over]))


def _lockstep(
    loaded: LoadedModel,
    cache: CompactCache,
    prompts: list[list[int]],
    limits: list[int],
    temperature: float,
    generator: torch.Generator,
    steps: list[Step],
) -> Iterator[tuple[list[int], bool]]:
    stops = loaded.chat.stop_ids
    columns = _columns(loaded, cache, prompts, limits, temperature, generator, steps)
    for prompt, limit, row in zip(prompts, limits, columns, strict=True):
        answer = row[len(prompt) : len(prompt) + limit]
        end = next((k for k, token in enumerate(answer) if token in stops), len(answer))
        yield answer[:end], end < len(answer)


@torch.no_grad()
def _columns(
    loaded: LoadedModel,
    cache: CompactCache,
    prompts: list[list[int]],
    limits: list[int],
    temperature: float,
    generator: torch.Generator,
    steps: list[Step],
) -> list[list[int]]:
    """Every row's prompt and what follows it, including whatever comes after a stop token."""
    model = loaded.model
    device = loaded.device
    fork = cache.fork(len(prompts))
    fork.step = steps.pop() if steps else None
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ends = lengths + torch.tensor(limits, device=device)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    total = max(len(p) + n for p, n in zip(prompts, limits, strict=True))
    rows = [p + [0] * (longest - len(p)) for p in prompts]
    given = torch.tensor(rows, device=device)  # [B, longest]
    stops = torch.tensor(sorted(loaded.chat.stop_ids), device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    ids = [given[:, :shortest]]
    logits = run(model, fork, ids[0], logits_to_keep=1).logits[:, -1]
    decoder = Decoder(model, fork, total - shortest - 1)
    for column in range(shortest, total):
        if column > shortest:
            logits = decoder.feed(ids[-1])
        token = _next(logits, temperature, generator)
        answering = lengths <= column
        if column < longest:
            token = torch.where(answering, token, given[:, column])
        ids.append(token[:, None])
        done |= (answering & torch.isin(token, stops)) | (ends <= column + 1)
        if column % _LOOK == 0 and column >= longest:
            done |= _asking(loaded, prompts, ids, device)
            if bool(done.all()):
                break
    fork.require_attended()
    steps += decoder.let_go()
    return [[int(t) for t in row] for row in torch.cat(ids, dim=1).tolist()]


def _asking(
    loaded: LoadedModel, prompts: list[list[int]], columns: list[torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Which rows `[B]` have come to the text that ends replies."""
    stop = loaded.chat.stop_text
    if stop is None:
        return torch.zeros(len(prompts), dtype=torch.bool, device=device)
    rows = torch.cat(columns, dim=1).tolist()
    texts = (whole_text(loaded.tokenizer, r[len(p) :]) for p, r in zip(prompts, rows, strict=True))
    return torch.tensor([stop in text for text in texts], device=device)


def _next(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """One token per row `[B]` from `logits [B, V]`."""
    if temperature == 0:
        return logits.argmax(-1)
    shares = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(shares, 1, generator=generator).squeeze(1)
