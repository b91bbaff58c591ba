"""Several contexts as one: each was read by itself, and is moved to follow the one before it.

Keys are rotated by the number of tokens that come before them, which for a RoPE of fixed
frequencies is what the model would have done had it read the text there. No rotation can supply
what a later text would have taken from an earlier one: each was read without the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from amcli.entries.ragged import Entries, appended
from amcli.entries.stores import with_keys
from amcli.errors import UsageError
from amcli.models import lengths
from amcli.models.cache import CompactCache
from amcli.models.lengths import changes_with_length
from amcli.models.rotary import Rotary
from amcli.pipeline.contexts.context import Context, held
from amcli.pipeline.contexts.reading import POSITIONS_FOR_ANSWERS

_ALONE = "chat with one context at a time"


def join(contexts: Sequence[Context]) -> Context:
    """One context of all, in order, for the model of the first; they may be full or compact.

    The ids are those of all contexts one after another, each with what its template put before
    the document. Rotated codes are rounded again, to the same number of bits. Raises UsageError
    where the model's RoPE cannot be rotated, or the model keeps states or has too few positions.
    """
    first, *others = contexts
    if not others:
        return first
    loaded, T = first.loaded, sum(context.T for context in contexts)
    geometry = lengths.for_context(loaded.geometry, T, POSITIONS_FOR_ANSWERS)
    _require_joinable(first, T, geometry.max_positions)
    rotary = _rotary(first)
    cache = CompactCache.empty(geometry)
    starts = [sum(context.T for context in contexts[:i]) for i in range(len(contexts))]
    for i, layer in enumerate(geometry.layers):
        parts = [
            _turned(part, rotary, i, start)
            for context, start in zip(contexts, starts, strict=True)
            for part in held(context.cache, i)
        ]
        if layer.window is None:
            cache.set_prefix(i, appended(parts, loaded.dtype), T)
        else:
            tails = [_dense(part) for part in parts]
            keys, values = (torch.cat(x, dim=1) for x in zip(*tails, strict=True))
            # A tail shorter than the window is its whole context, so nothing is missing.
            reach = min(layer.window - 1, T, keys.shape[1])
            cache.set_live(i, keys[:, -reach:], values[:, -reach:], T)
    return Context(
        replace(loaded, geometry=geometry),
        cache,
        [token for context in contexts for token in context.ids],
        first.document_start,
        starts[-1] + others[-1].document_end,
        others[-1].boundary,
        {**first.source, "name": ", ".join(str(c.source["name"]) for c in contexts)},
    )


def _require_joinable(first: Context, T: int, limit: int | None) -> None:
    loaded = first.loaded
    if first.cache.states:
        raise UsageError(
            f"{loaded.id} has layers that keep a state, and two states do not make one",
            _ALONE,
            code="contexts-not-joinable",
            field="contexts",
        )
    if limit is not None and limit < T + POSITIONS_FOR_ANSWERS:
        raise UsageError(
            f"the contexts have {T:,} tokens together, and {loaded.id} has {limit:,} positions",
            _ALONE,
            code="contexts-too-long",
            field="contexts",
            tokens=T,
            limit=limit,
        )


def _rotary(first: Context) -> Rotary:
    model, geometry = first.loaded.model, first.loaded.geometry
    kind = changes_with_length(model)
    if kind is not None:
        raise UsageError(
            f"{geometry.architecture} has {kind} RoPE, whose frequencies change with the length: "
            "a context cannot be moved behind another",
            _ALONE,
            code="contexts-not-joinable",
            field="contexts",
        )
    try:
        return Rotary(model, geometry)
    except UsageError as error:
        raise UsageError(
            f"the rotary position embedding of {geometry.architecture} could not be found, so a "
            "context cannot be moved behind another",
            _ALONE,
            code="contexts-not-joinable",
            field="contexts",
        ) from error


def _dense(entries: Entries) -> tuple[torch.Tensor, torch.Tensor]:
    """`[H, n, d]`, `[H, n, dv]` of a layer whose heads all hold the same tokens."""
    H, n = len(entries.lengths), entries.lengths[0]
    return entries.keys.unpack().reshape(H, n, -1), entries.values.unpack().reshape(H, n, -1)


def _turned(entries: Entries, rotary: Rotary, layer: int, tokens: int) -> Entries:
    """The same entries `tokens` positions later."""
    if tokens == 0 or not sum(entries.lengths):
        return entries
    keys = entries.keys.unpack()
    return with_keys(entries, _moved(keys, rotary, layer, tokens), keys.dtype)


def _moved(keys: torch.Tensor, rotary: Rotary, layer: int, tokens: int) -> torch.Tensor:
    """`keys [N, d]`, each moved `tokens` positions later from wherever it is; float32.

    Rotations add up, so it does not matter where a key was. Rotating back from position 0 takes
    out the factor by which some kinds of RoPE scale.
    """
    there = torch.full((keys.shape[0],), tokens)
    return rotary.unrotate(layer, rotary.rotate(layer, keys, there), torch.zeros_like(there))
