"""Writes a context as a folder that plain transformers loads, with the loader in it.

Heads of a layer are padded to the longest one, since a transformers cache has one rectangle per
layer; a separate tensor, which the loader's attention adds, holds the biases and marks padding.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from amcli.entries.ragged import Entries
from amcli.errors import UsageError
from amcli.storage.artifacts import Artifact
from amcli.system.files import output_errors, require_new_folder
from amcli.system.progress import SILENT, Progress

CACHE, ABOUT, LOADER = "cache.safetensors", "context.json", "loader.py"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written.

    entries, slots  entries stored, and slots in the rectangles: the rest is padding
    stored_bytes    bytes of the entries in the artifact; `padded_bytes`: of the rectangles
    """

    entries: int
    slots: int
    stored_bytes: int
    padded_bytes: int


def export(artifact: Artifact, folder: Path, progress: Progress = SILENT) -> Exported:
    """Writes `folder`, which must not exist, whole or not at all.

    Keys and values get the model's dtype, whatever the artifact's store. Raises UsageError for a
    context that plain transformers cannot hold, and whatever `files.output_errors` raises.
    """
    require_exportable(artifact)
    dtype = _DTYPES[artifact.manifest["model"]["dtype"]]
    tensors = {"ids": torch.tensor([artifact.token_ids()], dtype=torch.int64)}
    entries = slots = stored = 0
    progress.start("export", len(artifact.layers))
    for i in range(len(artifact.layers)):
        heads = artifact.heads(i)
        stored += heads.nbytes
        keys, values, bias = padded(heads.unpack(), dtype)
        tensors |= {f"keys.{i}": keys, f"values.{i}": values, f"bias.{i}": bias}
        entries += sum(heads.lengths)
        slots += bias.numel()
        progress.advance()
    _write(folder, tensors, _about(artifact))
    size = sum(x.nbytes for name, x in tensors.items() if name != "ids")
    return Exported(entries, slots, stored, size)


def require_exportable(artifact: Artifact) -> None:
    """Raises UsageError for layers that a full-attention transformers cache cannot have."""
    kinds = {layer.type for layer in artifact.layers} - {"full"}
    if kinds or artifact.manifest.get("states"):
        what = "sliding-window layers" if kinds else "layers that keep a state"
        raise UsageError(
            f"{artifact.path} has {what}, which the loader does not know",
            "use the Python API instead: amcli.load(path).attach(model)",
            code="not-exportable",
            field="artifact",
            path=artifact.path,
        )


def padded(heads: Entries, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys `[1, H, n, d]`, values `[1, H, n, dv]` and bias `[1, H, 1, n]` of a layer, with `n` the
    entries of the longest head; bias is float32, and -inf where there is no entry."""
    H, n = len(heads.lengths), max(heads.lengths)
    keys = torch.zeros(1, H, n, heads.key_dim, dtype=dtype)
    values = torch.zeros(1, H, n, heads.value_dim, dtype=dtype)
    bias = torch.full((1, H, 1, n), -torch.inf)
    for h, (k, v, beta) in enumerate(heads.heads()):
        keys[0, h, : len(k)], values[0, h, : len(k)] = k.to(dtype), v.to(dtype)
        bias[0, h, 0, : len(k)] = 0.0 if beta is None else beta
    return keys, values, bias


def _about(artifact: Artifact) -> dict[str, Any]:
    names = ("kind", "model", "tokenizer", "source", "logical_length", "boundary", "stored")
    kept = {name: artifact.manifest[name] for name in names}
    return {"format": "amkv-export", "version": 1, "ratio": artifact.ratio, **kept}


def _write(folder: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    require_new_folder(folder)
    with output_errors(folder):
        temporary = folder.parent / f".{folder.name[:48]}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        try:
            save_file(tensors, temporary / CACHE)
            text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
            (temporary / ABOUT).write_text(text, encoding="utf-8")
            shutil.copyfile(Path(__file__).with_name(LOADER), temporary / LOADER)
            # The cache was written through a private file and has kept that file's mode.
            shutil.copymode(temporary / ABOUT, temporary / CACHE)
            _sync([temporary / name for name in (CACHE, ABOUT, LOADER)])
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _sync(paths: Sequence[Path]) -> None:
    """Flushes files to disk, so that the final folder name never holds a half-written file."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
