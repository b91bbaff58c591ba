"""`amkv compact`: makes a compact context from a prefill or from a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amcli.commands import options as opt
from amcli.commands.shared import (
    PREFILL_ENDING,
    Stopwatch,
    choose_model,
    last_prefill,
    load,
    open_context,
    read_document,
    refuse_same,
    typed,
    work,
)
from amcli.commands.summary import fit_errors, stored_range
from amcli.console import Console, bytes_text, seconds_text
from amcli.errors import UsageError
from amcli.files import EXTENSION, looks_like_artifact, open_artifact, require_writable
from amcli.pipeline.source import STDIN, Source

if TYPE_CHECKING:
    from amcli.pipeline.compaction import Compaction

Ratio = Annotated[
    float | None,
    typer.Option(
        "--ratio",
        metavar="R",
        parser=opt.number("--ratio", "20", least=1),
        show_default=False,
        help="How many times smaller: full bytes over stored bytes. 20 if left out.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        metavar="N",
        parser=opt.whole("--tokens", "256", least=1),
        show_default=False,
        help="Instead of a ratio: entries kept per KV head, on average.",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help=(
            "omp, highest-attention (faster, weaker) or keep (everything); for comparison: "
            "streaming, random, knorm, keydiff, snapkv, tova, h2o, expected-attention, "
            "pyramidkv, kvzip, kvzip-uniform, am-highest-attention, am-omp."
        ),
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="NAME",
        show_default=False,
        help=(
            "How heads share the entries: adaptive, uniform, global, adakv or pyramid. The "
            "method's own if left out."
        ),
    ),
]
Queries = Annotated[
    str | None,
    typer.Option(
        "--queries",
        metavar="NAME",
        show_default=False,
        help=(
            "What stands for future questions: repeat (the document, said again) or context "
            "(the document's own). The method's own if left out."
        ),
    ),
]


def compact(
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", hidden=True, show_default=False)
    ] = None,
    ratio: Ratio = None,
    tokens: Tokens = None,
    method: Method = "omp",
    budget: Budget = None,
    queries: Queries = None,
    store: opt.Store = "native",
    seed: opt.Seed = 0,
    output: opt.Output = None,
    model: opt.Model = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Make a compact context, many times smaller than the full cache.

    SOURCE is a prefill artifact, a text file (which is prefilled first), or -
    for a text on standard input; left out, it is the last prefill. The output
    goes to the current folder, and its path is printed: doc.prefill.amkv and
    doc.txt become doc.amkv, any other NAME.amkv becomes NAME.compact.amkv.

    The model is the artifact's; for a text it is chosen as in prefill.

    \b
      amkv compact --ratio 20
      amkv compact handbook.txt --ratio 50 --method highest-attention
    """
    console = Console(json, quiet, debug)
    watch = Stopwatch()
    given = _Given.of(console, source)
    path = output or Path(given.output)
    if given.path is not None:
        refuse_same(path, given.path)
    require_writable(path, force)
    with work(console) as progress:
        from amcli.matching import recipes  # noqa: F401 - registers the methods
        from amcli.pipeline import compaction, contexts

        wanted: dict[str, Any] = {"ratio": ratio, "tokens": tokens, "method": method, "seed": seed}
        wanted |= {"budget": budget, "queries": queries, "store": store}
        options = compaction.Options(**{k: v for k, v in wanted.items() if v is not None})
        compaction.check(options, given.tokens)
        if isinstance(given.content, Source):
            with watch.stage("load"):
                loaded = load(progress, choose_model(console, model), device, dtype)
            with watch.stage("prefill"):
                context = contexts.prefill(loaded, given.content, progress=progress)
        else:
            with watch.stage("load"):
                context = open_context(progress, given.content, model, device, dtype)
        result = compaction.compact(context, options, progress=progress)
        watch.stages |= result.seconds
        with watch.stage("write"):
            progress.start("write", 0)
            manifest = result.save(path, force)
    _report(console, path, given, result, manifest, watch)


@dataclass(frozen=True)
class _Given:
    """What is compacted.

    content  the text of a document, or the path of a prefill artifact
    path     the file it comes from; None for standard input
    tokens   logical length, where that is known already
    output   name of the file to make
    """

    content: Source | Path
    path: Path | None
    tokens: int | None
    output: str

    @classmethod
    def of(cls, console: Console, source: str | None) -> _Given:
        """Reads and checks what the user named, in milliseconds."""
        if source is None:
            last = last_prefill()
            console.note(f"compacting {last}, the last prefill")
            return cls._artifact(last)
        if source != STDIN and looks_like_artifact(Path(source)):
            return cls._artifact(Path(source))
        text = read_document(console, source)
        path = None if source == STDIN else Path(source)
        return cls(text, path, None, text.stem + EXTENSION)

    @classmethod
    def _artifact(cls, path: Path) -> _Given:
        with open_artifact(path) as file:
            kind, tokens = file.kind, file.logical_length
        if kind != "prefill":
            raise UsageError(
                f"{path} is compact already",
                "name the document itself, or the prefill it was made from",
            )
        name = path.name
        if name.endswith(PREFILL_ENDING) and name != PREFILL_ENDING:
            output = name.removesuffix(PREFILL_ENDING) + EXTENSION
        else:
            output = f"{path.stem}.compact{EXTENSION}"
        return cls(path, path, tokens, output)


def _report(
    console: Console,
    path: Path,
    given: _Given,
    result: Compaction,
    manifest: dict[str, Any],
    watch: Stopwatch,
) -> None:
    context, loaded = result.context, result.context.loaded
    size = path.stat().st_size
    low, mean, high = stored_range(manifest["model"]["layers"], manifest["stored"])
    record = {
        "file": str(path),
        "kind": "compact",
        "source": None if given.path is None else str(given.path),
        "document": context.source["name"],
        "tokens": context.T,
        "model": loaded.id,
        "revision": loaded.revision,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "method": result.method.name,
        "budget": result.budget,
        "queries": manifest["queries"],
        "requested": manifest["requested"],
        "store": manifest["store"],
        "seed": manifest["seed"],
        "ratio": round(result.ratio, 4),
        "full_bytes": result.full_bytes,
        "stored_bytes": result.stored_bytes,
        "file_bytes": size,
        "stored_per_head": {"min": low, "mean": mean, "max": high},
        "fit_errors": fit_errors(manifest.get("fit_errors", {})),
        "seconds": watch.record(),
    }
    console.result(str(path), record)
    console.note(
        f"{bytes_text(result.full_bytes)} → {bytes_text(result.stored_bytes)}, "
        f"{result.ratio:.1f}× smaller, in {seconds_text(watch.total)}"
    )
    bits = "" if manifest["store"] == "native" else f", each number in {manifest['store']}"
    console.note(
        f"{context.T:,} tokens are now {mean:,.0f} entries a head ({low:,} to {high:,}){bits}"
    )
    console.note(f"next: {typed('amkv', 'chat', '--context', path)}")
