"""`amkv diff`: what two artifacts have in common, and how they differ."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from amcli.commands import options as opt
from amcli.commands.inspect import describe
from amcli.commands.screen.console import Console
from amcli.commands.screen.terminal import paint, printable
from amcli.system.files import open_artifact
from amcli.system.units import bytes_text
from amkv_format import compare_weights

_WIDEST = 26
"""Columns for a value: two values and a field's name fill 80."""

_SKIPPED = frozenset({"file", "layers", "kept_from", "tools", "weights"})


def diff(
    a: Annotated[Path, opt.artifact("A")],
    b: Annotated[Path, opt.artifact("B")],
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Show in what two artifacts differ.

    Document, model, size, how they were made, and how entries are shared out.
    Neither the model nor the keys and values are read: the hash of these says
    whether they are the same.

    \b
      amkv diff one.amkv two.amkv
    """
    console = Console(json, quiet, debug)
    found = []
    for path in (a, b):
        with open_artifact(path) as artifact:
            weights = artifact.manifest["model"].get("weights")
            found.append(describe(artifact, path) | {"weights": weights})
    record = compare(*found)
    console.result("\n".join(_text(record)), record)


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The record that `diff --json` prints, from two records of `inspect --json` with `weights`."""
    flat = [dict(_flat(record)) for record in (a, b)]
    names = list(dict.fromkeys([*flat[0], *flat[1]]))
    differences = {
        name: [each.get(name) for each in flat]
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    }
    return {
        "a": a["file"],
        "b": b["file"],
        "same_document": a["document"]["sha256"] == b["document"]["sha256"],
        "same_model": _model(a) == _model(b)
        and not compare_weights(a["weights"], b["weights"]).differing,
        "same_contents": a["payload_hash"] == b["payload_hash"],
        "differences": differences,
        "moved": _moved(a, b),
    }


def _model(record: dict[str, Any]) -> tuple[Any, ...]:
    model, tokenizer = record["model"], record["tokenizer"]
    return model["config_hash"], model["revision"], tokenizer["hash"], tokenizer["template_hash"]


def _flat(value: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of a record; those of nested objects as `object.field`."""
    for name, item in value.items():
        if not before and name in _SKIPPED:
            continue
        if isinstance(item, dict):
            yield from _flat(item, f"{before}{name}.")
        else:
            yield f"{before}{name}", item


def _moved(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """The share of all entries that moved to another head, both totals taken as one; None if the
    heads do not match."""
    rows = [[n for layer in x["layers"] for n in layer["stored"]] for x in (a, b)]
    shapes = [[len(layer["stored"]) for layer in x["layers"]] for x in (a, b)]
    if shapes[0] != shapes[1] or not all(map(sum, rows)):
        return None
    shares = [[n / sum(row) for n in row] for row in rows]
    return round(float(sum(abs(x - y) for x, y in zip(*shares, strict=True))) / 2, 4)


def _text(record: dict[str, Any]) -> Iterator[str]:
    """The record for people, in 80 columns."""
    yield f"A  {printable(record['a'])}"
    yield f"B  {printable(record['b'])}"
    yield ""
    for name in ("document", "model"):
        yield f"{_mark(record[f'same_{name}'])} {name}"
    yield f"{_mark(record['same_contents'])} keys and values"
    if record["moved"] is not None and record["moved"] > 0:
        yield f"  {record['moved']:.0%} of the entries are in other heads"
    if record["differences"]:
        yield ""
    for name, (a, b) in record["differences"].items():
        yield f"{name:<25} {_short(name, a):<{_WIDEST}} {_short(name, b)}".rstrip()


def _mark(same: bool) -> str:
    return paint("same     ", "32", sys.stdout) if same else paint("different", "33", sys.stdout)


def _short(name: str, value: Any) -> str:
    """A value, shortened."""
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return f"{value:,} ({bytes_text(value)})" if value < 10**9 else bytes_text(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    text = printable(str(value)).replace("\n", " ").removeprefix("sha256:")
    return text if len(text) < _WIDEST else text[: _WIDEST - 2] + "…"
