"""Run a model over a cache: feed token ids in chunks, sample token after token.

Knows neither templates nor files. A forward pass that fails or is interrupted leaves the cache
as it was before that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from transformers import PreTrainedModel

from amcli.errors import OutOfMemoryError
from amcli.models.cache import CompactCache
from amcli.models.calling import run
from amcli.models.failures import out_of_memory
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
        forward(decoder, model.device, cache, part)
        advance(len(part))


def _forward(model: PreTrainedModel, cache: CompactCache, ids: Sequence[int]) -> torch.Tensor:
    output = forward(model, model.device, cache, ids, logits_to_keep=1)
    logits: torch.Tensor = output.logits[0, -1].float()
    return logits


def forward(
    module: torch.nn.Module,
    device: torch.device,
    cache: CompactCache,
    ids: Sequence[int],
    **options: Any,
) -> Any:
    """One forward pass that leaves the cache as it was if it fails."""
    mark = cache.mark()
    inputs = torch.tensor([list(ids)], device=device)
    try:
        output = run(module, cache, inputs, **options)
        cache.require_attended()
    except BaseException as error:
        cache.rewind(mark)
        if out_of_memory(error):
            raise OutOfMemoryError(
                f"out of memory on {device} at token {mark.length + len(ids)}",
                "try a shorter document, dtype='bfloat16', or device='cpu'",
                code="out-of-memory",
                device=device,
            ) from error
        raise
    return output


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
    for _ in range(max_tokens):
        token = _choose(logits, temperature, generator)
        if token in stops:
            return
        yield token
        logits = feed(loaded.model, cache, [token])


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    # On the CPU, so that a seed means the same on every device.
    weights = (logits.double().cpu() / temperature).softmax(dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))
