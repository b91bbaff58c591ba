"""Documents read by a model: into a cache, a second time, and into a `prefill` artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from amcli.errors import UsageError
from amcli.models import lengths
from amcli.models.cache import CompactCache
from amcli.models.generate import CHUNK, absorb
from amcli.models.loading import LoadedModel
from amcli.pipeline.contexts.context import Context, dense
from amcli.pipeline.contexts.source import Source
from amcli.storage.artifacts import write_artifact
from amcli.system.progress import SILENT, Progress

POSITIONS_FOR_ANSWERS = 64
"""Positions that a document must leave free for a question and its answer."""


def prefill(
    loaded: LoadedModel,
    source: Source,
    *,
    system: str | None = None,
    chunk: int = CHUNK,
    progress: Progress = SILENT,
) -> Context:
    """Runs a document through the model in chunks; no logits are computed.

    Raises UsageError when the model has no positions for so long a document; where it has them
    but was not trained on them, `models.lengths.past_training` says so.
    """
    opened = loaded.chat.open_document(source.text, system)
    loaded = for_length(loaded, len(opened.ids))
    limit = loaded.geometry.max_positions
    if limit is not None and len(opened.ids) + POSITIONS_FOR_ANSWERS > limit:
        raise UsageError(
            f"{source.name} has {len(opened.ids):,} tokens, and {loaded.id} has {limit:,} "
            f"positions for it, {POSITIONS_FOR_ANSWERS} of them needed for questions",
            "shorten the document, or choose a model with a longer context",
            code="document-too-long",
            field="source",
            tokens=len(opened.ids),
            limit=limit,
        )
    cache = CompactCache.empty(loaded.geometry)
    progress.start("prefill", len(opened.ids))
    absorb(loaded.model, cache, opened.ids, chunk, progress.advance)
    return Context(
        loaded,
        cache,
        opened.ids,
        opened.document_start,
        opened.document_end,
        opened.boundary,
        source.manifest(),
    )


def reread(context: Context, *, progress: Progress) -> Context:
    """The same tokens in a full cache: the model reads all of them again."""
    cache = CompactCache.empty(context.loaded.geometry)
    progress.start("read the whole", context.T)
    absorb(context.loaded.model, cache, context.ids, CHUNK, progress.advance)
    return replace(context, cache=cache)


def emptied(context: Context) -> Context:
    """The same context around an empty document: shows what the model knows by itself."""
    ids = context.ids[: context.document_start] + context.ids[context.document_end :]
    loaded = for_length(context.loaded, len(ids))
    cache = CompactCache.empty(loaded.geometry)
    absorb(loaded.model, cache, ids)
    start = context.document_start
    return replace(context, loaded=loaded, cache=cache, ids=ids, document_end=start)


def for_length(loaded: LoadedModel, tokens: int) -> LoadedModel:
    """The same model, with its positions set up for a context of `tokens`."""
    geometry = lengths.for_context(loaded.geometry, tokens, POSITIONS_FOR_ANSWERS)
    return replace(loaded, geometry=geometry)


def save_prefill(context: Context, path: Path, overwrite: bool) -> dict[str, Any]:
    """Writes the full cache as an artifact of kind `prefill`; returns its manifest."""
    shard, layers = context.loaded.shard, []
    for i in range(len(context.loaded.geometry.layers)):
        heads = shard.whole(dense(context.cache, i))
        layers.append(heads if shard.size == 1 else heads.to("cpu"))  # a GPU never holds all twice
    manifest = {
        **context.manifest(),
        "kind": "prefill",
        "stored": [list(heads.lengths) for heads in layers],
    }
    states = context.cache.get_states()
    return shard.once(
        lambda: write_artifact(path, manifest, context.ids, layers, states, overwrite=overwrite)
    )
