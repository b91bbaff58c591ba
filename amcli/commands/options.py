"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from amcli.commands import completion
from amcli.errors import UsageError


def _field(option: str) -> str:
    """The name of the argument that an option stands for: `max_tokens` of `--max-tokens`."""
    return option.lstrip("-/").replace("-", "_")


def number(option: str, example: str, least: float = -math.inf) -> Callable[[object], float]:
    """A reader of numbers from `least` up; raises UsageError that names option and value."""

    def read(value: object) -> float:
        try:
            found = float(str(value).strip().removesuffix("x"))
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise UsageError(
                f"{option} {value} is not a number",
                f"for example {option} {example}",
                field=_field(option),
            )
        if found < least:
            raise UsageError(
                f"{option} {found:g} is below {least:g}",
                f"for example {option} {example}",
                field=_field(option),
            )
        return found

    return read


def whole(option: str, example: str, least: int = 0) -> Callable[[object], int]:
    """A reader of whole numbers from `least` up; raises UsageError like `number`."""

    def read(value: object) -> int:
        text = str(value).strip().replace(",", "").replace("_", "")
        try:
            found = int(text)
        except ValueError:
            raise UsageError(
                f"{option} {value} is not a whole number",
                f"for example {option} {example}",
                field=_field(option),
            ) from None
        if found < least:
            raise UsageError(
                f"{option} {found} is below {least}",
                f"for example {option} {example}",
                field=_field(option),
            )
        return found

    return read


_UNITS = "KMGT"


def size(option: str, example: str) -> Callable[[object], int]:
    """A reader of bytes, such as 8GB or 500M; raises UsageError that names option and value."""

    def read(value: object) -> int:
        text = str(value).strip().upper().replace(" ", "").removesuffix("B")
        step = 1024 if text.endswith("I") else 1000  # GiB or GB
        text = text.removesuffix("I")
        power = _UNITS.find(text[-1:]) + 1 if text else 0
        try:
            found = float(text[:-1] if power else text) * step**power
        except ValueError:
            found = math.nan
        if not (math.isfinite(found) and found >= 1):
            raise UsageError(
                f"{option} {value} is no amount of memory",
                f"for example {option} {example}",
                field=_field(option),
            )
        return int(found)

    return read


Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="NAME",
        show_default=False,
        autocompletion=completion.among(completion.STORES),
        help="How entries are stored: native (the model's dtype), int8, int4, or auto (int4, or "
        "int8 where 4 bits would lose too much or 8 have room for every key). Fewer bits, more "
        "entries at the same ratio. The method's own if left out.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="ID|PATH",
        show_default=False,
        autocompletion=completion.models,
        help="A Hugging Face id (ID@REVISION pins one), a model folder, a GGUF file, or pocket.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", show_default=False, help="Where to write the artifact."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        "--device-map",
        metavar="NAME",
        show_default=False,
        autocompletion=completion.among(completion.DEVICES),
        help="cpu, cuda or cuda:N; auto spreads layers over all GPUs. A GPU if there is one.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        show_default=False,
        autocompletion=completion.among(completion.DTYPES),
        help="float32, bfloat16 or float16; float32 on the CPU, else the model's own.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the code that a model brings. Read that code first."
    ),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", parser=whole("--seed", "1"), help="Seed of all random choices."
    ),
]
