"""`amkv import`: makes a prefill artifact from a full cache saved by another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amcli.commands import options as opt
from amcli.commands.screen.console import Console
from amcli.commands.shared import PREFILL_ENDING, load, read_document, refuse_same, typed, work
from amcli.errors import UsageError
from amcli.system.files import require_writable
from amcli.system.processes import require_one
from amcli.system.units import bytes_text


def import_(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", hidden=True, show_default=False)],
    model: opt.Model = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="DOC",
            show_default=False,
            help="The document that was read, at the start of the first user turn.",
        ),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            "--ids",
            metavar="FILE",
            show_default=False,
            help="Or the token ids that were read: a file with one JSON array.",
        ),
    ] = None,
    output: opt.Output = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Make a prefill artifact of a full cache that another tool has saved.

    CACHE is a safetensors file of one sequence: of mlx_lm.cache_prompt, or of
    a transformers DynamicCache. It does not say what it was made from, so the
    model has to be named, and the document or its token ids given. The first
    tokens are run through the model, and must give what CACHE holds.

    \b
      amkv import cache.safetensors --model Qwen/Qwen3-4B --text doc.txt
      amkv import cache.safetensors --model ./model --ids ids.json
    """
    console = Console(json, quiet, debug)
    require_one("import a cache", "start one process")
    if model is None:
        raise UsageError(
            "no model was named: a cache does not say what it was made with",
            "name it with --model, such as --model Qwen/Qwen3-4B",
        )
    if (text is None) == (ids is None):
        raise UsageError(
            "one of --text and --ids is needed: a cache does not say what was read",
            "give the document with --text doc.txt, or its token ids with --ids ids.json",
        )
    source = None if text is None else read_document(console, [text])
    path = output or Path(cache.stem + PREFILL_ENDING)
    refuse_same(path, cache)
    require_writable(path, force)
    with work(console) as progress:
        from amcli.conversions.importing import SavedCache, context_of, read_ids
        from amcli.pipeline.contexts import reading
        from amcli.pipeline.contexts.context import require_finite

        progress.start("read the cache", 0)
        saved = SavedCache.read(cache)
        given = None if ids is None else read_ids(ids)
        loaded = load(progress, model, device, dtype)
        context = context_of(saved, loaded, source, given)
        require_finite(context)
        progress.start("write", 0)
        reading.save_prefill(context, path, force)
    record = {
        "file": str(path),
        "kind": "prefill",
        "cache": str(cache),
        "document": context.source["name"],
        "tokens": context.T,
        "boundary": context.boundary,
        "model": loaded.id,
        "revision": loaded.revision,
        "file_bytes": path.stat().st_size,
    }
    console.result(str(path), record)
    console.note(f"{context.T:,} tokens; {bytes_text(path.stat().st_size)}")
    console.note(f"next: {typed('amkv', 'compact', path, '--ratio', '20')}")
