"""`amkv prefill`: runs a document through a model and writes its full KV cache to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amcli.commands import options as opt
from amcli.commands.screen.console import Console
from amcli.commands.shared import (
    PREFILL_ENDING,
    Stopwatch,
    choose_model,
    load,
    read_document,
    refuse_same,
    typed,
    warn_of_length,
    work,
)
from amcli.pipeline.contexts.source import STDIN
from amcli.system.files import require_writable
from amcli.system.memory import remember
from amcli.system.units import bytes_text, seconds_text


def prefill(
    documents: Annotated[list[str], typer.Argument(metavar="DOC", hidden=True, show_default=False)],
    model: opt.Model = None,
    output: opt.Output = None,
    system: opt.SystemBefore = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    trust_remote_code: opt.Trust = False,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Run a document through a model and keep its whole KV cache.

    DOC is a text in UTF-8, markdown, HTML, a PDF (pip install 'amkv[pdf]'), or -
    for standard input. Several make one context, in the order given, each
    under a line with its name. The cache is written to the first one's name
    with the ending .prefill.amkv, in the current folder, and that path is
    printed.

    Without --model, the model is $AMKV_MODEL, or that of the configuration
    file, or else pocket, a small demonstration model that ships with amkv.
    Before its weights are read, a line says what it takes in memory and how
    long a document may be; what cannot fit is refused.

    \b
      amkv prefill handbook.txt
      amkv prefill report.pdf appendix.md --model Qwen/Qwen3-4B --device cuda
      curl -s https://example.org/page.html | amkv prefill - -o page.amkv
    """
    console = Console(json, quiet, debug)
    watch = Stopwatch()
    source = read_document(console, documents)
    path = output or Path(source.stem + PREFILL_ENDING)
    for document in documents:
        if document != STDIN:
            refuse_same(path, Path(document))
    require_writable(path, force)
    spec = choose_model(console, model, "prefill")
    with work(console) as progress:
        from amcli.pipeline.contexts import reading

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
            context = reading.prefill(loaded, source, system=system, progress=progress)
        with watch.stage("write"):
            progress.start("write", 0)
            reading.save_prefill(context, path, force)
    warn_of_length(console, context)
    known = remember(path)
    size = path.stat().st_size
    record: dict[str, Any] = {
        "file": str(path),
        "kind": "prefill",
        "document": source.name,
        "tokens": context.T,
        "characters": len(source.text),
        "files": [file.record() for file in source.files],
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
