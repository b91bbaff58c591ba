"""`amkv bench`: how long each stage takes on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from amcli.commands import completion
from amcli.commands import options as opt
from amcli.commands.screen.console import Console
from amcli.commands.shared import load, work
from amcli.errors import UsageError
from amcli.matching.catalogue import DEFAULT
from amcli.models.catalogue import POCKET, SHAPES
from amcli.system.files import require_writable, write_json
from amcli.system.processes import require_one
from amcli.system.units import bytes_text

Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="NAME",
        show_default=False,
        autocompletion=completion.among(SHAPES),
        help=f"Random weights of a known shape: {opt.either(SHAPES)}. Times and "
        "memory are those of the real model, answers are noise.",
    ),
]
Repeats = Annotated[int, opt.count("--repeats", "5", "Runs to take medians of.", show_default=True)]


def bench(
    shape: Shape = None,
    layers: opt.LayerCount = None,
    tokens: opt.TimedTokens = 4096,
    ratio: opt.Ratio = None,
    method: opt.Method = DEFAULT,
    queries: opt.Queries = None,
    store: opt.Store = None,
    repeats: Repeats = 3,
    seed: opt.Seed = 0,
    output: opt.OutputRecord = None,
    model: opt.Model = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Time every stage of a compaction on this machine.

    Prefills and compacts a generated document, writes and loads the artifact.
    Next to each stage stands what share it uses of what the device can do: of
    a matrix product in the model's dtype, or of a copy, both measured here.

    \b
      amkv bench
      amkv bench --shape qwen3-4b --tokens 60000 --ratio 50
      amkv bench --model Qwen/Qwen3-4B --method highest-attention
    """
    console = Console(json, quiet, debug)
    require_one("be timed", "start one")
    if shape is not None and model is not None:
        raise UsageError("--shape and --model exclude each other", "give one of them")
    if layers is not None and shape is None:
        raise UsageError("--layers is for a --shape", "for example --shape qwen3-4b --layers 4")
    if output is not None:
        require_writable(output, overwrite=True)
    with work(console) as progress:
        from amcli.evaluation import bench as measuring
        from amcli.models.shapes import shaped
        from amcli.pipeline.compaction.request import Request, check

        request = Request.of(ratio=ratio, method=method, queries=queries, store=store, seed=seed)
        check(request, tokens)
        if shape is None:
            loaded = load(progress, model or POCKET, device, dtype)
        else:
            progress.start("make the model", 0)
            sizes = {} if layers is None else {"num_hidden_layers": layers}
            loaded = shaped(shape, device=device, dtype=dtype, **sizes)
        record = measuring.measure(loaded, tokens, request, repeats, progress)
    if output is not None:
        write_json(output, record, overwrite=True)
    console.result(_text(record), record)


def _text(record: dict[str, Any]) -> str:
    from amcli.evaluation.bench import table

    rows = table(record, bytes_text)
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {seconds:>{widths[1]}}  {rate:>{widths[2]}}  {share}".rstrip()
        for name, seconds, rate, share in rows
    ]
    peak = record["peak_memory"]
    memory = "" if peak is None else f", at most {bytes_text(peak)} of GPU memory"
    return "\n".join(
        [
            *lines,
            "",
            f"{record['tokens']:,} tokens, {record['model']}, {record['dtype']}, "
            f"{record['options']['method']} at {record['ratio']:.3g}×, {record['queries']}",
            f"{record['after_prefill']:.3g} s after the prefill{memory}; {record['hardware']}",
        ]
    )
