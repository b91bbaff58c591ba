"""`amkv list`: the artifacts in a folder, one line each; broken ones are listed too."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from amcli.commands import options as opt
from amcli.commands.failures import as_amkv_error
from amcli.commands.screen.console import Console
from amcli.commands.screen.terminal import columns, is_terminal, paint, printable
from amcli.errors import AmkvError, UsageError
from amcli.storage.summary import in_all, whole_ratio
from amcli.system.files import EXTENSION, open_artifact
from amcli.system.units import bytes_text

_HEADING = ("name", "model", "document", "tokens", "ratio", "size", "age")
_RIGHT = (3, 4, 5, 6)
"""Columns of numbers, from the left."""

_LEAST = 10
"""Width that a name keeps, however narrow the terminal is."""


def list_artifacts(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", hidden=True, show_default=False)
    ] = Path(),
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """List the artifacts in a folder.

    FOLDER is the current one if left out; folders in it are not looked into. A
    file that is not valid is listed with what is wrong, and is no error.

    \b
      amkv list
      amkv list contexts
    """
    console = Console(json, quiet, debug)
    found = [_entry(path) for path in _artifacts(folder)]
    if json:
        console.record({"folder": str(folder), "artifacts": found})
        return
    if not found:
        console.note(f"no {EXTENSION} files in {printable(str(folder))}")
        return
    console.data("".join(f"{line}\n" for line in _table(found)))


def _artifacts(folder: Path) -> list[Path]:
    """The artifacts in a folder, by name. Raises UsageError if there is no such folder."""
    try:
        paths = [p for p in folder.iterdir() if p.suffix.lower() == EXTENSION]
    except NotADirectoryError as error:
        raise UsageError(f"{folder} is a file", f"amkv inspect {folder}") from error
    except FileNotFoundError as error:
        raise UsageError(f"no such folder: {folder}", "check the path") from error
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror}", "check the path") from error
    return sorted(paths)


def _entry(path: Path) -> dict[str, Any]:
    """One file for `list --json`; `error` says what is wrong with a broken one."""
    names = ("kind", "model", "document", "tokens", "ratio", "whole_ratio", "method", "store")
    found: dict[str, Any] = dict.fromkeys((*names, "created", "error"))
    found = {"name": path.name, "file_bytes": None, **found}
    try:
        found["file_bytes"] = path.stat().st_size
        with open_artifact(path) as artifact:
            manifest = artifact.manifest
            found |= {
                "kind": artifact.kind,
                "model": manifest["model"]["id"],
                "document": manifest["source"]["name"],
                "tokens": artifact.logical_length,
                "ratio": round(artifact.ratio, 4),
                "whole_ratio": round(whole_ratio(artifact), 4),
                "store": artifact.store,
                "created": manifest["created"],
            }
            if artifact.kind == "compact":
                found["method"] = manifest["method"]["name"]
    except AmkvError as error:
        found["error"] = as_amkv_error(error).message
    except OSError as error:
        found["error"] = f"cannot read it: {error.strerror}"
    return found


def _table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The files for people, as wide as the terminal; names that do not fit are cut."""
    rows = [_HEADING, *(_row(entry) for entry in found if entry["error"] is None)]
    broken = [entry for entry in found if entry["error"] is not None]
    if len(rows) > 1:
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADING))]
        if is_terminal(sys.stdout):
            _fit(widths, columns(sys.stdout) - 2 * (len(widths) - 1))
        for row in rows:
            cells = [
                _cut(cell, width).rjust(width) if i in _RIGHT else _cut(cell, width).ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            yield "  ".join(cells).rstrip()
    for entry in broken:
        mark = paint("broken:", "31", sys.stdout)
        yield f"{mark} {printable(entry['error'])}"


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    ratio = f"{entry['ratio']:.1f}×{in_all(entry['ratio'], entry['whole_ratio'])}"
    if entry["kind"] == "prefill":
        ratio = "whole"
    cells = (
        entry["name"],
        entry["model"],
        entry["document"],
        f"{entry['tokens']:,}",
        ratio,
        bytes_text(entry["file_bytes"]),
        age(entry["created"], time.time()),
    )
    return tuple(printable(cell) for cell in cells)


def age(created: str, now: float) -> str:
    """Roughly how long ago an RFC 3339 time was: `5 min`, `3 h`, `12 d`."""
    try:  # fromisoformat takes at most six fractional digits
        whole = created.partition("Z")[0].partition(".")[0]
        seconds = now - datetime.fromisoformat(f"{whole}+00:00").timestamp()
    except (ValueError, OverflowError):
        return "?"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:,.0f} {unit}"
    return "now"


def _fit(widths: list[int], room: int) -> None:
    """Narrows the widest of the first three columns until all have room."""
    while sum(widths) > room and max(widths[:3]) > _LEAST:
        widths[widths.index(max(widths[:3]))] -= 1


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
