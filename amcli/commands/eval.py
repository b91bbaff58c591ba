"""`amkv eval`: measures how much a compact context still knows, by method and ratio."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amcli.commands import completion
from amcli.commands import options as opt
from amcli.commands.eval_table import LiveTable, Notes, table_text
from amcli.commands.screen.console import Console
from amcli.commands.screen.terminal import animated, columns, is_terminal
from amcli.commands.shared import choose_model, load, work
from amcli.errors import UsageError
from amcli.evaluation.catalogue import DEFAULT_ASKED, DEFAULT_SUITE, SUITES
from amcli.system.files import require_writable
from amcli.system.processes import require_one

if TYPE_CHECKING:
    from amcli.evaluation.results import Results

Suite = Annotated[
    str | None,
    typer.Option(
        "--suite",
        metavar="NAME",
        autocompletion=completion.among(SUITES),
        show_default=False,
        help=f"{opt.either(opt.explained(name, x.brief) for name, x in SUITES.items())}. With a "
        f"file of --questions {DEFAULT_ASKED}, else {DEFAULT_SUITE} if left out.",
    ),
]
Docs = Annotated[
    int | None, opt.count("--docs", "8", "Documents; the suite's own number if left out.")
]
Reason = Annotated[
    bool,
    typer.Option(
        "--reason", help="Multiple choice: let the model think briefly, then write a letter."
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs",
        "-j",
        metavar="N",
        parser=opt.whole("--jobs", "2", least=1),
        help="Documents at a time, each in a process with its own copy of the model, over all "
        "GPUs: faster with small models.",
    ),
]


def evaluate(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", hidden=True, show_default=False)
    ] = None,
    suite: Suite = None,
    method: opt.Methods = opt.METHODS,
    ratio: opt.Ratios = opt.RATIOS,
    docs: Docs = None,
    questions: opt.NumberOfQuestions = None,
    tokens: opt.MadeTokens = None,
    budget: opt.Budget = None,
    queries: opt.QueriesOfEach = None,
    store: opt.Store = None,
    reason: Reason = False,
    seed: opt.Seed = 0,
    output: opt.OutputResults = None,
    plot: opt.PlotResults = None,
    jobs: Jobs = 1,
    model: opt.Model = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    trust_remote_code: opt.Trust = False,
    force: opt.StartOver = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Measure what compact contexts still know, by method and ratio.

    Each document is compacted by each method at each ratio, and all of its
    questions are asked. Rows: recall (right answers, word for word), NLL of the
    right answer and KL divergence to the full context (nats per answer token),
    how often the likeliest token agrees with the full context's. Two rows are
    always there: the full context and none.

    FILE is what qa, quality, longhealth and perplexity read: for qa JSON lines of
    documents and questions, or a document with --questions FILE. There, the whole
    document's own answers are measured too: how many come out the same.

    \b
      amkv eval --method omp,snapkv --ratio 5,20,100 -o results.json
      amkv eval report.pdf --questions questions.jsonl --model Qwen/Qwen3-4B
      amkv eval book.txt --suite perplexity --model Qwen/Qwen3-4B --plot ppl.png
    """
    console = Console(json, quiet, debug)
    require_one("measure together", "start one, with --device auto for several GPUs")
    _check_outputs(output, plot)
    spec = choose_model(console, model, "eval")
    with work(console) as progress:
        from amcli.evaluation import parallel, runner
        from amcli.evaluation import results as _  # noqa: F401 - the slow imports, with a word
        from amcli.evaluation.settings import Settings
        from amcli.evaluation.suites import base

        if plot is not None:
            from amcli.evaluation import plot as plotting

            plotting.require()
        asked = questions if isinstance(questions, Path) else None
        settings = Settings.of(
            base.get(suite or (DEFAULT_SUITE if asked is None else DEFAULT_ASKED)),
            method, ratio,  # type: ignore[arg-type]
            path=file, asked=asked, docs=docs, questions=None if asked else questions,
            tokens=tokens, seed=seed, budget=budget, queries=queries, store=store, reason=reason,
        )  # fmt: skip
        loaded = load(progress, spec, device, dtype, trust=trust_remote_code, console=console)
        progress.start("make documents", 0)
        documents, results = runner.prepare(settings, loaded)
        if output is not None and not force:
            results.resume(output)
        again = parallel.Spec(spec, device, dtype, trust_remote_code)
        measure = partial(
            parallel.run, settings, loaded, again, documents, results, jobs=jobs
        )  # fmt: skip
    _run(console, measure, results, output)
    if plot is not None:
        plotting.draw(results, plot)
        console.note(f"drew {plot}")
    console.result(_summary(results), results.record(cells=False))


def _check_outputs(output: Path | None, plot: Path | None) -> None:
    if output is not None:
        require_writable(output, overwrite=True)
    if plot is not None:
        if plot.suffix.lower() not in opt.PLOT_ENDINGS:
            known = opt.either(opt.PLOT_ENDINGS)
            raise UsageError(f"--plot {plot} is no picture", f"name it {known}")
        require_writable(plot, overwrite=True)


def _run(
    console: Console,
    measure: Callable[..., None],
    results: Results,
    output: Path | None,
) -> None:
    """Measures the missing cells, and keeps the file up to date."""
    from amcli.models.failures import quiet

    def save() -> None:
        if output is not None:
            results.write(output)

    if results.cells:
        there, count = len(results.cells), len(results.documents) * len(results.order())
        console.note(f"{output} has {there} of {count} cells")
    show = LiveTable(results) if animated() and not console.quiet else Notes(console, results)
    try:
        with quiet(), show:
            measure(show, save)
        save()
    except KeyboardInterrupt:
        if output is not None and results.cells:
            console.note(f"what is done is in {output}; the same command goes on from there")
        raise


def _summary(results: Results) -> str:
    """The table, with what it was measured on below it."""
    from amcli.evaluation.results import plural

    settings = results.settings
    questions = sum(map(len, results.questions))
    lengths = [document["tokens"] for document in results.documents]
    stored = "" if settings["store"] is None else f", entries in {settings['store']}"
    width = columns(sys.stdout) if is_terminal(sys.stdout) else None
    length = " to ".join(f"{n:,}" for n in sorted({min(lengths), max(lengths)}))
    return (
        f"{table_text(results.rows(), width)}\n\n"
        f"{settings['suite']}: {plural(len(lengths), 'document')} of {length} tokens, "
        f"{plural(questions, 'question')}, {settings['model']}, "
        f"{settings['dtype']}{stored}, seed {settings['seed']}"
    )
