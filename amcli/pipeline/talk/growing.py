"""Lets a context grow: a conversation about it is compacted and becomes part of it.

The entries that the context already holds stay as they are. The tokens of the conversation since
then are compacted just as a document is, as the live part of a cache with a prefix, and their
entries are appended to the others. Positions are kept: what was compacted still counts for every
one of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amcli.entries.ragged import Entries, appended
from amcli.entries.stores import settled
from amcli.errors import UsageError
from amcli.models import lengths
from amcli.models.cache import CompactCache
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.defaults import DEFAULT_RATIO
from amcli.pipeline.compaction.plan import Target
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context, full_layers, held
from amcli.pipeline.contexts.reading import POSITIONS_FOR_ANSWERS
from amcli.pipeline.talk.session import Session
from amcli.storage.artifacts import stores_recorded, write_artifact
from amcli.system.progress import Progress

RATIO = DEFAULT_RATIO
"""Default ratio for a conversation: facts told in one survive even a ratio of 50
(docs/benchmarks/dialogue.json)."""

LEAST = 8
"""Mean entries per head that a compacted conversation keeps at least, whatever the ratio."""


@dataclass(frozen=True)
class Growth:
    """What one compaction of a conversation did.

    tokens        tokens of the conversation that are now in the context
    full, stored  their bytes, before and after
    """

    tokens: int
    full: int
    stored: int

    @property
    def ratio(self) -> float:
        """Full over stored bytes."""
        return self.full / self.stored if self.stored else 1.0


def grow(
    session: Session, ratio: float = RATIO, queries: str = "repeat", *, progress: Progress
) -> Growth:
    """Compacts what was said since the last time into the session's context.

    Nothing changes if it fails or is interrupted. Raises UsageError when nothing was said or no
    positions are left to repeat it, and whatever `compaction.compact` raises.
    """
    n = len(session.ids)
    if not n:
        raise UsageError(
            "there is nothing to compact: nothing was said since",
            "ask a question",
            code="nothing-said",
        )
    # A document that is not compact stays whole, as entries.
    prefix = {i: _held(session.context, i) for i in full_layers(session.context)}
    cache = session.cache.fork()
    for layer, entries in prefix.items():
        cache.set_prefix(layer, entries, session.context.T)
    request = Request(
        ratio=max(1.0, min(ratio, n / LEAST)),
        queries=queries,
        store={layer: entries.store for layer, entries in prefix.items()},
        seed=session.seed,
    )
    found = compact(_said(session, cache), request, progress=progress, errors=False)
    context = _grown(session, cache, prefix, found)
    session.context, session.cache, session.ids = context, context.cache.fork(), []
    session.settled = len(session.history)
    return Growth(n, found.full_bytes, found.stored_bytes)


def save(session: Session, path: Path, overwrite: bool) -> dict[str, Any]:
    """Writes the context with all that was compacted into it as an artifact of kind `compact`.

    Returns its manifest. What was said since the last `grow` is left out. Raises UsageError for a
    model whose RoPE changes with the length, and whatever `write_artifact` raises.
    """
    context = session.context
    loaded = context.loaded
    there = lengths.for_context(loaded.geometry, context.T, POSITIONS_FOR_ANSWERS)
    if there.turned_for != loaded.geometry.turned_for:
        raise UsageError(
            f"{loaded.geometry.architecture} turns keys by the length of the context, which has "
            "changed since it was read",
            "keep the conversation as text",
            code="keys-of-another-length",
        )
    layers = [settled(_held(context, i)) for i in range(len(loaded.geometry.layers))]
    stored = sum(layers[i].nbytes for i in full_layers(context))
    full = Target.of(context).full_bytes
    manifest = {
        **context.manifest(),
        "kind": "compact",
        "stored": [list(entries.lengths) for entries in layers],
        **stores_recorded(layers, full_layers(context)),
        "method": {"name": "chat"},
        "budget": {"name": "adaptive"},
        "requested": {"ratio": full / stored if stored else 1.0},
        "seed": session.seed,
        "queries": {"source": "repeat", "count": 0},
        "conversation": {"turns": session.settled, "tokens": context.T - session.origin.T},
    }
    states = context.cache.get_states()
    return write_artifact(path, manifest, context.ids, layers, states, overwrite=overwrite)


def _held(context: Context, layer: int) -> Entries:
    """All that a layer holds, as one set of entries."""
    return appended(held(context.cache, layer), context.loaded.dtype)


def _said(session: Session, cache: CompactCache) -> Context:
    """The conversation since the last compaction as a context of its own, behind a prefix."""
    context, n = session.context, len(session.ids)
    geometry = context.loaded.geometry
    if geometry.max_positions is not None:
        geometry = replace(geometry, max_positions=geometry.max_positions - context.T)
    return Context(
        replace(context.loaded, geometry=geometry),
        cache,
        session.ids,
        0,
        n,
        "raw" if context.boundary == "raw" else "turn_closed",
        context.source,
        before=context.T,
    )


def _grown(
    session: Session, cache: CompactCache, prefix: dict[int, Entries], found: Compaction
) -> Context:
    """The context and the compacted conversation as one context."""
    old, dtype = session.context, session.context.loaded.dtype
    ids = old.ids + session.ids
    for layer, entries in prefix.items():
        cache.set_prefix(layer, appended([entries, found.layers[layer]], dtype), len(ids))
    return replace(old, cache=cache, ids=ids, boundary=found.context.boundary)
