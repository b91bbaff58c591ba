"""Run a model over a cache: feed token ids in chunks, sample token after token.

Knows neither templates nor files. A forward pass that fails or is interrupted leaves the cache
as it was before that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from collections.abc import Set as AbstractSet

import torch
from transformers import PreTrainedModel

from amcli.models.cache import CompactCache
from amcli.models.decoding import Decoder, forward
from amcli.models.geometry import decoder_of
from amcli.models.loading import LoadedModel

CHUNK = 2048
"""Tokens a forward pass takes: enough to keep a GPU busy, few enough to bound its memory."""


@torch.no_grad()
def feed(
    model: PreTrainedModel, cache: CompactCache, ids: Sequence[int], chunk: int = CHUNK
) -> torch.Tensor:
    """Append `ids` to a cache of one sequence; return the last token's logits `[V]`, float32.

    Logits of other positions are never computed. Raises ValueError without ids, OutOfMemoryError
    when the device is full; the cache then holds the chunks before the one that failed.
    """
    if not ids:
        raise ValueError("no token ids to feed")
    *parts, last = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
    for part in parts:
        _forward(model, cache, part)
    return _forward(model, cache, last)


@torch.no_grad()
def absorb(
    model: PreTrainedModel,
    cache: CompactCache,
    ids: Sequence[int],
    chunk: int = CHUNK,
    advance: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Append `ids` to a cache of one sequence without computing any logits.

    `advance(tokens)` is called after each chunk. Raises OutOfMemoryError as `feed`.
    """
    decoder = decoder_of(model)
    for i in range(0, len(ids), chunk):
        part = ids[i : i + chunk]
        forward(decoder, cache, torch.tensor([list(part)], device=model.device))
        advance(len(part))


def _forward(model: PreTrainedModel, cache: CompactCache, ids: Sequence[int]) -> torch.Tensor:
    inputs = torch.tensor([list(ids)], device=model.device)
    logits: torch.Tensor = forward(model, cache, inputs, logits_to_keep=1).logits[0, -1]
    return logits.float()


def stream(
    loaded: LoadedModel,
    cache: CompactCache,
    ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: AbstractSet[int] | None = None,
) -> Generator[int, None, None]:
    """Feed `ids`, then yield up to `max_tokens` new tokens, and end before one of `stop_ids`.

    Greedy at temperature 0, otherwise sampled with a generator of its own, so that equal seeds
    give equal answers. `stop_ids` are the chat template's when None.

    Each token is fed when the next one is asked for. So an exhausted iterator leaves `ids` and
    every yielded token in the cache; one closed early, or interrupted while computing, leaves out
    the last yielded token. A stop token is never yielded and never enters the cache.
    """
    stops = loaded.chat.stop_ids if stop_ids is None else stop_ids
    generator = torch.Generator().manual_seed(seed)
    logits = feed(loaded.model, cache, ids)
    decoder = Decoder(loaded.model, cache, max_tokens)
    for _ in range(max_tokens):
        token = _choose(logits, temperature, generator)
        told = _Told(token)
        # Where the device can begin with the next step, it need not wait for anyone to read this.
        begun = decoder.ahead(token[None])
        if told.value() in stops:
            return
        yield told.value()
        if begun is None:
            logits = decoder.feed(token[None])[0]
        else:
            decoder.keep()
            logits = begun[0]


class _Told:
    """A token `[1]` on its way to the processor, which waits for no more than that."""

    def __init__(self, token: torch.Tensor) -> None:
        self._token, self._arrived = token, None
        if token.is_cuda:
            self._token = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            self._token.copy_(token, non_blocking=True)
            self._arrived = torch.cuda.current_stream(token.device).record_event()

    def value(self) -> int:
        """The token."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._token)


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """A token `[1]` on the device of `logits [V]`, without waiting for it."""
    if temperature <= 0:
        return logits.argmax(-1, keepdim=True)
    shares = (logits.double() / temperature).softmax(dim=-1)
    # What `torch.multinomial` draws on a CPU, so that a seed means the same on every device.
    noise = torch.empty(shares.shape, dtype=shares.dtype).exponential_(generator=generator)
    if logits.is_cuda:
        noise = noise.pin_memory().to(logits.device, non_blocking=True)
    return (shares / noise).argmax(-1, keepdim=True)
