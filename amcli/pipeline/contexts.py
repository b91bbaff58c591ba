"""Contexts: a document in a model's cache, from a text or from an artifact, full or compact."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from amcli import __version__
from amcli.artifacts import Artifact, write_artifact
from amcli.errors import AmkvError, ModelMismatchError, UsageError
from amcli.models import lengths
from amcli.models.cache import CompactCache
from amcli.models.generate import CHUNK, absorb
from amcli.models.loading import LoadedModel
from amcli.models.state import placed, state_differences
from amcli.pipeline.progress import Progress, Silent
from amcli.pipeline.source import Source
from amcli.quantize import Entries
from amcli.ragged import RaggedHeads

POSITIONS_FOR_ANSWERS = 64
"""Positions that a document has to leave free for a question and its answer."""


@dataclass
class Context:
    """A document in the cache of a loaded model.

    ids        `T` token ids; the document is `ids[document_start:document_end]`
    boundary   `in_user_turn`, `raw` or `turn_closed`: what a question has to be led in with
    source     name, hash and size of the text, as the manifest holds them
    before     tokens that the cache holds ahead of `ids`, as a prefix that stays as it is
    """

    loaded: LoadedModel
    cache: CompactCache
    ids: list[int]
    document_start: int
    document_end: int
    boundary: str
    source: dict[str, Any]
    before: int = 0

    @property
    def T(self) -> int:
        """Logical length: tokens of the context as the model saw them."""
        return len(self.ids)

    def lead(self, question: str, think: bool = False) -> list[int]:
        """Token ids from the end of the context to where the answer to a question begins."""
        chat = self.loaded.chat
        if self.boundary == "turn_closed":
            return chat.next_turn(question, think)
        return chat.first_turn(question, think)

    def manifest(self) -> dict[str, Any]:
        """What the manifests of prefill and compact artifacts have in common."""
        return {
            **self.loaded.fingerprint(),
            "source": self.source,
            "logical_length": self.T,
            "document_start": self.document_start,
            "document_end": self.document_end,
            "boundary": self.boundary,
            "tools": tools(),
        }


def tools() -> dict[str, str]:
    """Versions of what made an artifact."""
    found = {"amkv": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def prefill(
    loaded: LoadedModel,
    source: Source,
    *,
    system: str | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Context:
    """Runs a document through the model in chunks; no logits are computed.

    Raises UsageError when the model has no positions for so long a document; where it has them,
    but was not made for them, `models.lengths.past_training` says so.
    """
    progress = progress or Silent()
    opened = loaded.chat.open_document(source.text, system)
    loaded = _for_length(loaded, len(opened.ids))
    limit = loaded.geometry.max_positions
    if limit is not None and len(opened.ids) + POSITIONS_FOR_ANSWERS > limit:
        raise UsageError(
            f"{source.name} has {len(opened.ids):,} tokens, and {loaded.id} has {limit:,} "
            f"positions for it, {POSITIONS_FOR_ANSWERS} of them needed for questions",
            "shorten the document, or choose a model with a longer context with --model",
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


def _for_length(loaded: LoadedModel, tokens: int) -> LoadedModel:
    """The same model, with the positions that a context of so many tokens has."""
    geometry = lengths.for_context(loaded.geometry, tokens, POSITIONS_FOR_ANSWERS)
    return replace(loaded, geometry=geometry)


def save_prefill(context: Context, path: Path, overwrite: bool) -> dict[str, Any]:
    """Writes the full cache as an artifact of kind `prefill`; returns its manifest."""
    shard, layers = context.loaded.shard, []
    for i in range(len(context.loaded.geometry.layers)):
        heads = shard.whole(dense(context.cache, i))
        layers.append(heads if shard.size == 1 else heads.to("cpu"))  # not all twice on a GPU
    manifest = {
        **context.manifest(),
        "kind": "prefill",
        "stored": [list(heads.lengths) for heads in layers],
    }
    states = context.cache.get_states()
    return shard.once(
        lambda: write_artifact(path, manifest, context.ids, layers, states, overwrite=overwrite)
    )


def dense(cache: CompactCache, layer: int) -> RaggedHeads:
    """What a layer holds live, of a cache of one sequence: the tail in a sliding layer."""
    keys, values = cache.live(layer)
    return RaggedHeads.dense(keys[0], values[0])


def shared(context: Context, layers: Sequence[Entries] | None = None) -> CompactCache:
    """A cache with the entries of full layers as a prefix, which all rows of a batch share.

    `layers` are the entries of all heads, those that the context holds live when None.
    """
    cache = context.cache.fork()
    if context.before:  # there is a prefix already
        return cache
    for i in full_layers(context):
        mine = context.loaded.shard.mine
        heads: Entries = dense(context.cache, i) if layers is None else mine(layers[i])
        if context.T:
            cache.set_prefix(i, heads, context.T)
    return cache


def model_of(artifact: Artifact) -> str:
    """The name that loads the model of an artifact again, its revision pinned."""
    model = artifact.manifest["model"]
    return model["id"] if model["revision"] is None else f"{model['id']}@{model['revision']}"


def misfits(artifact: Artifact, loaded: LoadedModel) -> list[str]:
    """Why an artifact does not fit a model, in words; empty when it does. Reads no tensor."""
    found = loaded.differences(artifact.manifest["model"], artifact.manifest["tokenizer"])
    # Without this a state that is absent would be taken for that of an empty text.
    return found + state_differences(artifact.state_shapes(), loaded.geometry.kept)


def restore(artifact: Artifact, loaded: LoadedModel) -> Context:
    """The context of an artifact in a cache of `loaded`.

    Raises ModelMismatchError when the artifact was made for another model, saying what differs.
    """
    manifest, states = artifact.manifest, artifact.states()
    if found := misfits(artifact, loaded):
        raise ModelMismatchError(
            f"{artifact.path} was made for another model than {loaded.id}: {'; '.join(found)}",
            f"use --model {model_of(artifact)}, or compact the document again for this model",
        )
    T = artifact.logical_length
    loaded = _for_length(loaded, T)
    cache = CompactCache.empty(loaded.geometry)
    for i, layer in enumerate(loaded.geometry.layers):
        place = loaded.geometry.devices[i]
        heads = loaded.shard.mine(artifact.heads(i, place)).to(place, loaded.dtype)
        if layer.type == "full" and artifact.kind == "compact":
            cache.set_prefix(i, heads, T)
        else:  # numbers, whatever the store: a reader of files refuses codes here
            live, n = heads.unpack(), heads.lengths[0]
            keys = live.keys.view(layer.kv_heads, n, -1)
            cache.set_live(i, keys, live.values.view(layer.kv_heads, n, -1), T)
    cache.set_states(
        {
            (i, name): placed(name, state, loaded.geometry.state_devices[i], loaded.dtype)
            for (i, name), state in states.items()
        }
    )
    return Context(
        loaded,
        cache,
        artifact.token_ids(),
        manifest["document_start"],
        manifest["document_end"],
        manifest["boundary"],
        manifest["source"],
    )


def full_layers(context: Context) -> Sequence[int]:
    """Layers that can be compacted: those that see the whole document."""
    return context.loaded.geometry.full_layers


def live_keys(context: Context, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`K [H, T, d]`, `V [H, T, dv]` of a full layer that is not compacted yet; a sliding one's
    tail."""
    keys, values = context.cache.live(layer)
    return keys[0], values[0]


def require_finite(context: Context) -> None:
    """Raises AmkvError naming the first layer whose keys, values or state are not all numbers."""
    for layer in range(len(context.loaded.geometry.layers)):
        for name, tensor in zip(("keys", "values"), live_keys(context, layer), strict=True):
            _require_finite(f"layer {layer}", name, tensor)
    for (place, name), state in context.cache.get_states().items():
        _require_finite(f"layer {place} of the model", f"{name} state", state)


def _require_finite(layer: str, name: str, tensor: torch.Tensor) -> None:
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        raise AmkvError(
            f"{layer}: {wrong:,} of {tensor.numel():,} numbers of the {name} are infinite or no "
            "numbers",
            "prefill the document again with --dtype bfloat16 or float32",
        )
