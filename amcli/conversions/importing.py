"""Contexts from full caches that other tools saved as safetensors.

A cache file holds keys and values but not what they were made from, so the token ids and the model
have to be given. The first tokens are run through the model and must give the keys and values in
the file: this detects another model, other ids or another layout of heads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from amcli.errors import ModelMismatchError, UsageError
from amcli.models.cache import CompactCache
from amcli.models.generate import absorb
from amcli.models.geometry import LayerGeometry
from amcli.models.lengths import for_context
from amcli.models.loading import LoadedModel
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.reading import POSITIONS_FOR_ANSWERS
from amcli.pipeline.contexts.source import Source
from amcli.system.files import input_errors

CHECKED = 32
"""Number of first tokens run through the model for comparison."""

TOLERANCE = 0.3
"""Allowed relative error of their keys and values: results of another tool with quantised weights
differ a little, those of other weights or other ids by more than 1."""

_ELSE = "save it as docs/conversions.md shows"

_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<layer>\d+)\.(?P<part>0|1)",  # mlx_lm
        r"(?:layers\.|past_key_values\.)?(?P<layer>\d+)\.(?P<part>keys?|values?)",
        r"(?P<part>key|value)_cache\.(?P<layer>\d+)",
    )
)
_KEYS = ("0", "key", "keys")


@dataclass(frozen=True)
class SavedCache:
    """Keys `[1, H, n, d]` and values `[1, H, n, dv]` of each layer of a file."""

    path: Path
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def read(cls, path: Path) -> SavedCache:
        """Reads a safetensors file; raises UsageError if it is not a cache of one sequence."""
        with input_errors(path):
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
                    metadata = file.metadata() or {}
            except FileNotFoundError:
                raise
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    f"{path} is not a safetensors file: {error}",
                    _ELSE,
                    code="not-a-cache",
                    field="path",
                    path=path,
                ) from error
        # mlx_lm files name the cache class of each layer.
        kinds = {value for name, value in metadata.items() if re.fullmatch(r"2\.\d+", name)}
        if other := sorted(kinds - {"KVCache"}):
            raise UsageError(
                f"{path} holds a {other[0]}, not KVCaches alone",
                _ELSE,
                code="not-a-cache",
                field="path",
                path=path,
            )
        return cls(path, _layers(path, tensors))


def read_ids(path: Path) -> list[int]:
    """Token ids from a file with one JSON array; raises UsageError for anything else."""
    with input_errors(path):
        try:
            ids = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{path} is not JSON",
                "write the token ids as [1, 2, 3]",
                code="not-token-ids",
                field="path",
                path=path,
            ) from error
    if not isinstance(ids, list) or not ids or not all(type(x) is int and x >= 0 for x in ids):
        raise UsageError(
            f"{path} is not an array of token ids",
            "write them as [1, 2, 3]",
            code="not-token-ids",
            field="path",
            path=path,
        )
    return ids


def context_of(
    saved: SavedCache, loaded: LoadedModel, source: Source | None, ids: list[int] | None
) -> Context:
    """The context of a saved cache.

    source  the document: its ids are those that a prefill would have read
    ids     instead of the document, the ids that were read; the context then has no chat template

    Raises UsageError when the lengths differ or the model keeps states, ModelMismatchError when
    the layers are not the model's, or their numbers are not what it gives for the first tokens.
    """
    if loaded.geometry.states:
        raise UsageError(
            f"{loaded.id} has layers that keep a state, which no such file holds",
            "prefill the document itself",
            code="cache-without-states",
            field="model",
            model=loaded.id,
        )
    if ids is None and source is not None:
        opened = loaded.chat.open_document(source.text)
        ids, place, boundary = opened.ids, opened[1:3], opened.boundary
    elif ids is not None:
        place, boundary = (0, len(ids)), "raw"
        source = source or Source(saved.path.name, _decoded(loaded, ids))
    else:
        raise ValueError("a source or ids are needed")
    geometry = for_context(loaded.geometry, len(ids), POSITIONS_FOR_ANSWERS)
    loaded = replace(loaded, geometry=geometry)
    cache = _cache(saved, loaded, len(ids))
    _compare(saved, loaded, ids, cache)
    return Context(loaded, cache, ids, *place, boundary, source.manifest())


def _layers(
    path: Path, tensors: Mapping[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found: dict[tuple[int, bool], torch.Tensor] = {}
    for name, tensor in tensors.items():
        matches = [match for known in _NAMES if (match := known.fullmatch(name))]
        if not matches:
            raise UsageError(
                f"{path} has a tensor {name!r}, which is no layer's",
                _ELSE,
                code="not-a-cache",
                field="path",
                path=path,
            )
        found[int(matches[0]["layer"]), matches[0]["part"] in _KEYS] = tensor
        if tensor.ndim != 4 or tensor.shape[0] != 1 or not tensor.is_floating_point():
            what = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise UsageError(
                f"{name} of {path} is {what}, not floats [1, heads, n, dim]",
                _ELSE,
                code="not-a-cache",
                field="path",
                path=path,
            )
    count = len(found) // 2
    if not found or found.keys() != {(i, k) for i in range(count) for k in (True, False)}:
        raise UsageError(
            f"{path} does not have keys and values of layers 0, 1, and so on",
            _ELSE,
            code="not-a-cache",
            field="path",
            path=path,
        )
    return [(found[i, True], found[i, False]) for i in range(count)]


def _cache(saved: SavedCache, loaded: LoadedModel, T: int) -> CompactCache:
    geometry = loaded.geometry
    if len(saved.layers) != len(geometry.layers):
        raise ModelMismatchError(
            f"{saved.path} has {len(saved.layers)} layers, {loaded.id} has {len(geometry.layers)}",
            "name the model that the cache was made with",
            code="cache-of-another-model",
            field="model",
            path=saved.path,
            model=loaded.id,
        )
    cache = CompactCache.empty(geometry)
    for i, (layer, (keys, values)) in enumerate(zip(geometry.layers, saved.layers, strict=True)):
        n = _rows(saved.path, i, layer, keys, values, T)
        keys, values = (x[0, :, x.shape[2] - n :] for x in (keys, values))
        place = geometry.devices[i] if geometry.devices else loaded.device
        cache.set_live(i, keys.to(place, loaded.dtype), values.to(place, loaded.dtype), T)
    return cache


def _rows(
    path: Path, i: int, layer: LayerGeometry, keys: torch.Tensor, values: torch.Tensor, T: int
) -> int:
    """How many of a layer's last tokens are kept: all, or those within the window."""
    shapes = [(x.shape[1], x.shape[3]) for x in (keys, values)]
    if shapes != [(layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim)]:
        raise ModelMismatchError(
            f"layer {i} of {path} has {shapes[0][0]} heads of {shapes[0][1]}, the model "
            f"{layer.kv_heads} of {layer.key_dim}",
            "name the model that the cache was made with",
            code="cache-of-another-model",
            field="model",
            path=path,
        )
    wanted = T if layer.window is None else min(T, layer.window - 1)
    there = keys.shape[2]
    if values.shape[2] != there or there < wanted or (layer.window is None and there != T):
        raise UsageError(
            f"layer {i} of {path} has {there:,} tokens, the ids are {T:,}",
            "give the document, or the tokens, that the cache was made from",
            code="cache-of-another-length",
            field="ids",
            path=path,
            tokens=there,
            ids=T,
        )
    return wanted


def _compare(saved: SavedCache, loaded: LoadedModel, ids: list[int], cache: CompactCache) -> None:
    """Raises ModelMismatchError where the model gives other keys or values for the first tokens."""
    first = ids[:CHECKED]
    own = CompactCache.empty(loaded.geometry)
    absorb(loaded.model, own, first)
    for i, layer in enumerate(loaded.geometry.layers):
        if layer.window is not None and len(ids) >= layer.window:
            continue  # the first tokens are no longer in the cache
        for name, mine, theirs in zip(("keys", "values"), own.live(i), cache.live(i), strict=True):
            there = theirs[0][:, : mine.shape[2]].float()
            error = float((there - mine[0].float()).norm() / mine[0].float().norm())
            if not error <= TOLERANCE:
                raise ModelMismatchError(
                    f"{saved.path} is not what {loaded.id} makes of these tokens: {name} of layer "
                    f"{i} differ by {error:.0%}",
                    "give the model and the document, or the tokens, that the cache was made from",
                    code="cache-of-another-text",
                    field="ids",
                    path=saved.path,
                    model=loaded.id,
                    error=error,
                )


def _decoded(loaded: LoadedModel, ids: list[int]) -> str:
    tokenizer: Any = loaded.tokenizer
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
