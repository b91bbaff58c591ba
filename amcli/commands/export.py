"""`amkv export`: writes a context in a form that other tools can read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amcli.commands import options as opt
from amcli.commands.screen.console import Console
from amcli.commands.shared import work
from amcli.errors import UsageError
from amcli.system.files import open_artifact, require_new_folder
from amcli.system.units import bytes_text

FORMS = ("transformers",)


def export(
    file: opt.Artifact,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FORM", help="transformers: a folder with a padded cache and a loader."
        ),
    ] = "transformers",
    output: opt.OutputFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Write a context for plain transformers, without amkv.

    FILE is a prefill or compact artifact of a model whose layers all see the
    whole text. Heads are padded to the longest one of their layer, and numbers
    get the model's dtype, so the folder is larger than FILE: the command says
    by how much. docs/conversions.md shows how to load it.

    \b
      amkv export doc.amkv
      amkv export doc.amkv -o shared/doc
    """
    console = Console(json, quiet, debug)
    if to not in FORMS:
        raise UsageError(f"unknown form {to!r}", f"forms: {', '.join(FORMS)}")
    open_artifact(file).close()  # says what is wrong before anything heavy is loaded
    folder = output or Path(f"{file.stem}.transformers")
    require_new_folder(folder)
    with work(console) as progress:
        from amcli.conversions.exporting import export as write
        from amcli.storage.artifacts import Artifact

        with Artifact.open(file) as artifact:
            made = write(artifact, folder, progress)
    padding = 1 - made.entries / made.slots if made.slots else 0.0
    record = {
        "folder": str(folder),
        "file": str(file),
        "to": to,
        "entries": made.entries,
        "slots": made.slots,
        "padding": round(padding, 4),
        "stored_bytes": made.stored_bytes,
        "padded_bytes": made.padded_bytes,
    }
    console.result(str(folder), record)
    console.note(
        f"{padding:.0%} of the slots are padding: {bytes_text(made.padded_bytes)} in the folder, "
        f"{bytes_text(made.stored_bytes)} in {file}"
    )
