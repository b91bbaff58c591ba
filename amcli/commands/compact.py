"""`amkv compact`: makes a compact context from a prefill or from a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amcli.commands import options as opt
from amcli.commands import planning, receipt
from amcli.commands.screen.console import Console
from amcli.commands.shared import (
    PREFILL_ENDING,
    Stopwatch,
    choose_model,
    load,
    open_contexts,
    read_document,
    refuse_same,
    typed,
    warn_of_length,
    work,
)
from amcli.errors import UsageError
from amcli.matching.catalogue import DEFAULT
from amcli.pipeline.contexts.source import STDIN, Source
from amcli.storage.summary import stored_range
from amcli.system.files import (
    EXTENSION,
    looks_like_artifact,
    open_artifact,
    read_ahead,
    require_writable,
)
from amcli.system.memory import last_prefill

if TYPE_CHECKING:
    from amcli.pipeline.compaction.result import Compaction


def _share(value: object) -> float:
    found = opt.number("--fidelity", "0.98")(value)
    if not 0 < found <= 1:
        raise UsageError(
            f"--fidelity {found:g} is not a share: above 0, and at most 1",
            "for example --fidelity 0.98",
            field="fidelity",
        )
    return found


Fidelity = Annotated[
    float | None,
    typer.Option(
        "--fidelity",
        metavar="F",
        parser=_share,
        show_default=False,
        help="Instead of a ratio: the smallest context that keeps a share F of what the document "
        "contributes, such as 0.98, as measured on quotes of it. Takes several compactions.",
    ),
]
SaveBudget = Annotated[
    Path | None,
    typer.Option(
        "--save-budget",
        metavar="FILE",
        show_default=False,
        help="Write how heads shared the entries, for --budget FILE on another document.",
    ),
]
MemoryLimit = Annotated[
    int | None,
    typer.Option(
        "--memory-limit",
        metavar="SIZE",
        parser=opt.size("--memory-limit", "8GB"),
        show_default=False,
        help="Memory that the fits may take beside the model and the cache, such as 8GB. Less of "
        "it means smaller groups of heads, and more time; two fifths of what is free on a GPU.",
    ),
]
Plan = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="Print what would be done, with memory and an estimate of the time, and do nothing.",
    ),
]
Positions = Annotated[
    bool,
    typer.Option(
        "--positions",
        help="Store which token each entry was taken from: 4 bytes an entry, part of the ratio.",
    ),
]


def compact(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="SOURCE", hidden=True, show_default=False)
    ] = None,
    ratio: opt.RatioOrAuto = None,
    tokens: opt.Tokens = None,
    fidelity: Fidelity = None,
    method: opt.Method = DEFAULT,
    budget: opt.BudgetOrFile = None,
    save_budget: SaveBudget = None,
    queries: opt.Queries = None,
    store: opt.Store = None,
    memory_limit: MemoryLimit = None,
    positions: Positions = False,
    plan: Plan = False,
    seed: opt.Seed = 0,
    output: opt.Output = None,
    model: opt.Model = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    trust_remote_code: opt.Trust = False,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Make a compact context, many times smaller than the full cache.

    SOURCE is a prefill artifact, or a document as in prefill, which is then
    prefilled first; left out, it is the last prefill. The output goes to the
    current folder, and its path is printed: doc.prefill.amkv and doc.txt
    become doc.amkv, any other NAME.amkv becomes NAME.compact.amkv.

    The model is the artifact's; for a text it is chosen as in prefill.

    \b
      amkv compact --ratio 20
      amkv compact --ratio auto
      amkv compact handbook.txt --plan
      amkv compact handbook.txt --ratio 50 --method highest-attention
      amkv compact handbook.txt --fidelity 0.98
    """
    console = Console(json, quiet, debug)
    watch = Stopwatch()
    given = _Given.of(console, sources or [])
    path = output or Path(given.output)
    if not plan:
        _check_outputs(given, path, save_budget, force)
    if isinstance(given.content, Path) and not plan:
        read_ahead(given.content)
    with work(console):
        from amcli.pipeline.compaction import compacting
        from amcli.pipeline.compaction.request import Request, check
        from amcli.pipeline.contexts import reading
        from amcli.storage.artifacts import NewArtifact

        request = Request.of(
            ratio=ratio,
            tokens=tokens,
            fidelity=fidelity,
            method=method,
            budget=budget,
            queries=queries,
            seed=seed,
            store=store,
            memory_limit=memory_limit,
            positions=positions,
        )
        check(request, given.tokens)
    if plan:
        planning.show(console, given.content, request, model, device, dtype, trust_remote_code)
        return
    with work(console) as progress:
        if isinstance(given.content, Source):
            with watch.stage("load"):
                spec = choose_model(console, model, "compact")
                loaded = load(
                    progress,
                    spec,
                    device,
                    dtype,
                    trust=trust_remote_code,
                    console=console,
                    source=given.content,
                )
            with watch.stage("prefill"):
                context = reading.prefill(loaded, given.content, progress=progress)
        else:
            with watch.stage("load"):
                context = open_contexts(
                    progress,
                    [given.content],
                    model,
                    device,
                    dtype,
                    trust=trust_remote_code,
                    console=console,
                )
        warn_of_length(console, context)
        with NewArtifact(path, force) as new:
            result = compacting.compact(context, request, progress=progress, into=new)
            watch.stages |= result.seconds
            with watch.stage("write"):
                progress.start("write", 0)
                manifest = result.finish(new)
                if save_budget is not None:
                    result.save_budget(save_budget, force)
    _report(console, path, given, result, manifest, watch, save_budget)


def _check_outputs(given: _Given, path: Path, budget: Path | None, force: bool) -> None:
    """Refuses outputs that cannot be written or would replace something, before any work."""
    if budget is not None and budget.absolute() == path.absolute():
        raise UsageError(
            f"the artifact and the budget would both be written to {path}",
            "name another file with --save-budget",
        )
    for output in (path, budget):
        if output is None:
            continue
        for source in given.paths:
            refuse_same(output, source)
        require_writable(output, force)


@dataclass(frozen=True)
class _Given:
    """What to compact.

    content  the text of a document, or the path of a prefill artifact
    paths    the files it comes from; none for standard input
    tokens   logical length, if already known
    output   name of the file to write
    """

    content: Source | Path
    paths: tuple[Path, ...]
    tokens: int | None
    output: str

    @classmethod
    def of(cls, console: Console, sources: Sequence[str]) -> _Given:
        """Reads and checks what the user named, in milliseconds."""
        if not sources:
            last = last_prefill()
            console.note(f"compacting {last}, the last prefill")
            return cls._artifact(last)
        if len(sources) == 1 and sources[0] != STDIN and looks_like_artifact(Path(sources[0])):
            return cls._artifact(Path(sources[0]))
        text = read_document(console, sources)
        paths = tuple(Path(source) for source in sources if source != STDIN)
        return cls(text, paths, None, text.stem + EXTENSION)

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
        return cls(path, (path,), tokens, output)


def _report(
    console: Console,
    path: Path,
    given: _Given,
    result: Compaction,
    manifest: dict[str, Any],
    watch: Stopwatch,
    saved: Path | None,
) -> None:
    context, loaded, plan = result.context, result.context.loaded, result.plan
    size = path.stat().st_size
    low, mean, high = stored_range(manifest["model"]["layers"], manifest["stored"])
    record = {
        "file": str(path),
        "kind": "compact",
        "source": ", ".join(map(str, given.paths)) or None,
        "document": context.source["name"],
        "tokens": context.T,
        "model": loaded.id,
        "revision": loaded.revision,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "method": result.plan.method.name,
        "budget": plan.budget,
        "budget_file": None if plan.file is None else str(plan.file.path),
        "saved_budget": None if saved is None else str(saved),
        "queries": manifest["queries"],
        "requested": manifest["requested"],
        "store": manifest["store"],
        "seed": manifest["seed"],
        "ratio": round(result.ratio, 4),
        "whole_ratio": round(result.whole_ratio, 4),
        "full_bytes": result.full_bytes,
        "stored_bytes": result.stored_bytes,
        "file_bytes": size,
        "stored_per_head": {"min": low, "mean": mean, "max": high},
        **receipt.record(result, manifest),
        "seconds": watch.record(),
    }
    console.result(str(path), record)
    stages, total = dict(watch.stages), watch.total
    for line in receipt.lines(result, manifest, stages, total):
        console.note(line)
    if plan.file is not None and plan.file.made_elsewhere(manifest["model"]):
        console.note(f"{plan.file.path} was made with another model: its shares fit this one")
    if saved is not None:
        console.note(f"budget written to {saved}")
    console.note(f"next: {typed('amkv', 'chat', '--context', path)}")
