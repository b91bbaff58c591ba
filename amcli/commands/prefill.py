"""`amkv prefill`: runs a document through a model and keeps its whole KV cache in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amcli.commands import options as opt
from amcli.commands.shared import (
    PREFILL_ENDING,
    Stopwatch,
    choose_model,
    load,
    read_document,
    refuse_same,
    remember,
    typed,
    warn_of_length,
    work,
)
from amcli.console import Console, bytes_text, seconds_text
from amcli.errors import UsageError
from amcli.files import looks_like_artifact, require_writable
from amcli.pipeline.source import STDIN


def prefill(
    document: Annotated[str, typer.Argument(metavar="DOC", hidden=True, show_default=False)],
    model: opt.Model = None,
    output: opt.Output = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            metavar="TEXT",
            show_default=False,
            help="A system prompt, read before the document.",
        ),
    ] = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    trust_remote_code: opt.Trust = False,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Run a document through a model and keep its whole KV cache.

    DOC is a text file in UTF-8, or - for standard input. The cache is written
    to DOC's name with the ending .prefill.amkv, in the current folder, and
    that path is printed.

    Without --model, the model is $AMKV_MODEL, or else pocket, a small
    demonstration model that ships with amkv.

    \b
      amkv prefill handbook.txt
      amkv prefill handbook.txt --model Qwen/Qwen3-4B --device cuda
    """
    console = Console(json, quiet, debug)
    watch = Stopwatch()
    if document != STDIN and looks_like_artifact(Path(document)) and Path(document).is_file():
        raise UsageError(
            f"{document} is an artifact, not a text",
            f"to go on with it: {typed('amkv', 'compact', document)}",
        )
    source = read_document(console, document)
    path = output or Path(source.stem + PREFILL_ENDING)
    if document != STDIN:
        refuse_same(path, Path(document))
    require_writable(path, force)
    spec = choose_model(console, model)
    with work(console) as progress:
        from amcli.pipeline import contexts

        with watch.stage("load"):
            loaded = load(
                progress,
                spec,
                device,
                dtype,
                trust=trust_remote_code,
                console=console,
                source=source,
            )
        with watch.stage("prefill"):
            context = contexts.prefill(loaded, source, system=system, progress=progress)
        with watch.stage("write"):
            progress.start("write", 0)
            contexts.save_prefill(context, path, force)
    warn_of_length(console, context)
    known = remember(path)
    size = path.stat().st_size
    record: dict[str, Any] = {
        "file": str(path),
        "kind": "prefill",
        "document": source.name,
        "tokens": context.T,
        "characters": len(source.text),
        "model": loaded.id,
        "revision": loaded.revision,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "file_bytes": size,
        "seconds": watch.record(),
    }
    console.result(str(path), record)
    console.note(
        f"{context.T:,} tokens read by {loaded.id} on {loaded.device}; "
        f"{bytes_text(size)} in {seconds_text(watch.total)}"
    )
    following = typed("amkv", "compact", *([] if known else [path]), "--ratio", "20")
    console.note(f"next: {following}")
