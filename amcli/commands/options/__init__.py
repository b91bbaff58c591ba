"""Options that several commands share, each declared once; `values` reads their values.

Where the help differs between commands, the option is a function of it, and its variants follow.
Names of methods, stores, suites and the like come from the catalogues.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from amcli.commands import completion
from amcli.commands.options.values import names, number_or, number_or_path, ratios
from amcli.commands.options.values import number as number
from amcli.commands.options.values import size as size
from amcli.commands.options.values import whole as whole
from amcli.entries.catalogue import BITS, NATIVE, PACKED, STORES
from amcli.evaluation.catalogue import ALL, COMPARED, SPECIAL
from amcli.matching.catalogue import BUDGETS, OWN, RIVALS
from amcli.models.catalogue import DEVICES, DTYPES, POCKET
from amcli.pipeline.compaction.defaults import AUTO, AUTO_FIDELITY, COARSE, DEFAULT_RATIO, FINE
from amcli.pipeline.queries.catalogue import DEFAULT, MIXTURE, SOURCES


def either(names: Iterable[str]) -> str:
    """Names as help lists them: a, b or c."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def explained(name: str, brief: str) -> str:
    """A name as help shows it, with its brief description if any."""
    return f"{name} ({brief})" if brief else name


# ---- what is asked for -----------------------------------------------------------------------


def ratio(help: str, show_default: bool = False, word: str | None = None) -> Any:
    """`--ratio`: how many times smaller; a number, or a word."""
    given: dict[str, Any] = {"option": "--ratio", "example": "20", "least": 1}
    return typer.Option(
        "--ratio",
        metavar="R" if word is None else f"R|{word}",
        parser=number(**given) if word is None else number_or(word, **given),
        show_default=show_default,
        help=help,
    )


RATIOS = "5,10,20,50"
"""The ratios measured by default."""

Ratio = Annotated[
    float | None,
    ratio(f"How many times smaller: full bytes over stored bytes. {DEFAULT_RATIO:g} if left out."),
]
RatioOrAuto = Annotated[
    Any,
    ratio(
        f"How many times smaller: full bytes over stored bytes; or {AUTO}: as --fidelity "
        f"{AUTO_FIDELITY:g}. {DEFAULT_RATIO:g} if left out.",
        word=AUTO,
    ),
]
DemoRatio = Annotated[float, ratio("How many times smaller.", show_default=True)]
Ratios = Annotated[
    str,
    typer.Option(
        "--ratio",
        metavar="R,R,…",
        parser=ratios("--ratio", RATIOS),
        help="How many times smaller; several.",
    ),
]


def count(name: str, example: str, help: str, least: int = 1, show_default: bool = False) -> Any:
    """An option that counts something."""
    return typer.Option(
        name,
        metavar="N",
        parser=whole(name, example, least=least),
        show_default=show_default,
        help=help,
    )


Tokens = Annotated[
    int | None,
    count("--tokens", "256", "Instead of a ratio: entries kept per KV head, on average."),
]
MadeTokens = Annotated[
    int | None, count("--tokens", "2048", "Length of a document that the suite makes.")
]
TimedTokens = Annotated[
    int, count("--tokens", "4096", "Length of the document.", least=64, show_default=True)
]

Method = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        autocompletion=completion.methods,
        help=f"{either(explained(name, x.brief) for name, x in OWN.items())}; for "
        f"comparison: {', '.join(RIVALS)}.",
    ),
]
METHODS = ",".join(COMPARED)
"""The methods measured by default."""

Methods = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="A,B,…",
        autocompletion=completion.several_methods(*SPECIAL, ALL),
        parser=names("--method", METHODS, "method"),
        help="Methods of amkv compact; besides, "
        f"{', '.join(explained(name, brief) for name, brief in SPECIAL.items())}, and {ALL}, for "
        "all but those that keep everything.",
    ),
]


def budget(help: str, metavar: str = "NAME") -> Any:
    """`--budget`: how heads share the entries."""
    return typer.Option(
        "--budget",
        metavar=metavar,
        autocompletion=completion.among(BUDGETS),
        show_default=False,
        help=help,
    )


BudgetOrFile = Annotated[
    str | None,
    budget(
        f"How heads share the entries: {either(BUDGETS)}, or a file of --save-budget. The method's "
        "own if left out.",
        metavar="NAME|FILE",
    ),
]
Budget = Annotated[
    str | None, budget("How heads share the entries. Each method's own if left out.")
]


def queries(help: str) -> Any:
    """`--queries`: where reference queries come from."""
    return typer.Option(
        "--queries",
        metavar="NAME",
        autocompletion=completion.among([*SOURCES, MIXTURE]),
        show_default=False,
        help=f"What stands for future questions{help}",
    )


Queries = Annotated[
    str | None,
    queries(
        f": {', '.join(explained(name, brief) for name, brief in SOURCES.items())}, or a mixture "
        f"such as {MIXTURE}. The method's own if left out, which is {DEFAULT} for those of amkv."
    ),
]
QueriesOfEach = Annotated[str | None, queries(". Each method's own if left out.")]

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="NAME",
        show_default=False,
        autocompletion=completion.among([AUTO, *STORES]),
        help=f"How entries are stored: {explained(NATIVE, STORES[NATIVE])}, "
        f"{', '.join(name for name in STORES if name != NATIVE and name not in PACKED)}, kKvV "
        f"(K bits a number of a key and V of a value, each {', '.join(map(str, BITS[:-1]))} or "
        f"{BITS[-1]}: k4v2), or {AUTO} (for each layer {COARSE}, or {FINE} where {COARSE} would "
        f"lose too much, for sliding windows, and where {FINE} too has room for every key). Fewer "
        "bits, more entries at the same ratio. The method's own if left out.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", parser=whole("--seed", "1"), help="Seed of all random choices."
    ),
]


def system(help: str) -> Any:
    """`--system`: instructions to the model."""
    return typer.Option("--system", metavar="TEXT", show_default=False, help=help)


SystemBefore = Annotated[str | None, system("A system prompt, read before the document.")]
SystemAfter = Annotated[
    str | None, system("Instructions, put between the document and the first question.")
]


def questions(help: str, metavar: str = "FILE", **more: Any) -> Any:
    """`--questions`: a file of questions."""
    return typer.Option("--questions", metavar=metavar, show_default=False, help=help, **more)


Questions = Annotated[
    Path | None,
    questions(
        'A file of questions, one JSON object a line with a "question"; each is asked by '
        "itself. The answers are printed as JSON lines. - reads standard input."
    ),
]
NumberOfQuestions = Annotated[
    str | None,
    questions(
        "Questions of each kind about a document; or a file of them about the document "
        "FILE, as amkv chat --questions reads it, with an answer each.",
        metavar="N|FILE",
        parser=number_or_path("--questions", "10"),
    ),
]

LayerCount = Annotated[
    int | None, count("--layers", "4", "So many layers instead of the shape's own.")
]
LayerTable = Annotated[
    bool, typer.Option("--layers", help="A table of all layers, and hashes and versions.")
]

# ---- the model -------------------------------------------------------------------------------

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="ID|PATH",
        show_default=False,
        autocompletion=completion.models,
        help=f"A Hugging Face id (ID@REVISION pins one), a model folder, a GGUF file, or {POCKET}.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        "--device-map",
        metavar="NAME",
        show_default=False,
        autocompletion=completion.among(DEVICES),
        help="cpu, cuda or cuda:N; auto spreads layers over all GPUs. A GPU if there is one.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        show_default=False,
        autocompletion=completion.among(DTYPES),
        help=f"{either(DTYPES)}; float32 on the CPU, else the model's own.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the code that a model brings. Read that code first."
    ),
]

# ---- what is read and written ----------------------------------------------------------------


def artifact(metavar: str = "FILE") -> Any:
    """An artifact given as an argument, not an option."""
    return typer.Argument(
        metavar=metavar, hidden=True, show_default=False, autocompletion=completion.artifacts
    )


Artifact = Annotated[Path, artifact()]
Artifacts = Annotated[list[Path], artifact()]


def output(help: str, metavar: str = "FILE") -> Any:
    """`--output`: where a command writes its result."""
    return typer.Option("--output", "-o", metavar=metavar, show_default=False, help=help)


Output = Annotated[Path | None, output("Where to write the artifact.")]
OutputRecord = Annotated[Path | None, output("Write the result as JSON.")]
OutputResults = Annotated[
    Path | None,
    output("Results as JSON, kept up to date; the same command goes on where it stopped."),
]
OutputFolder = Annotated[
    Path | None,
    output(
        "The folder to make; FILE's name with the ending .transformers if left out.",
        metavar="FOLDER",
    ),
]


def plot(help: str) -> Any:
    """`--plot`: a picture of what is printed."""
    return typer.Option("--plot", metavar="FILE", show_default=False, help=help)


PLOT_ENDINGS = (".png", ".pdf", ".svg")
PlotHeads = Annotated[
    Path | None, plot("Draw what --heads shows: .png, .svg, .pdf or .html; replaced if there.")
]
PlotResults = Annotated[
    Path | None,
    plot(f"Draw recall and KL against the ratio: {either(PLOT_ENDINGS)}; replaced if there."),
]


def force(help: str) -> Any:
    """`--force`: existing files do not stop the command."""
    return typer.Option("--force", "-f", help=help)


Force = Annotated[bool, force("Replace an existing output.")]
StartOver = Annotated[bool, force("Start over, whatever the output holds.")]

# ---- what is printed -------------------------------------------------------------------------

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]
