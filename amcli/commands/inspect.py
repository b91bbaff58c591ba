"""`amkv inspect`: shows what an artifact holds, without the model and without torch."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import typer

from amcli.commands import options as opt
from amcli.commands.heads import HeadMap, draw, kept_from, maps, strip
from amcli.commands.screen import picture
from amcli.commands.screen.console import Console
from amcli.commands.screen.terminal import coloured, columns, printable
from amcli.entries.catalogue import MIXED, NATIVE
from amcli.errors import ArtifactError
from amcli.storage.summary import (
    fit_errors,
    in_all,
    payload_bytes,
    stored_range,
    stores_text,
    whole_ratio,
)
from amcli.system.files import open_artifact
from amcli.system.units import bytes_text, error_text
from amkv_format import AmkvFile, FormatError, state_tensor

STRIP = 64
"""Parts of the context that `kept_from` counts."""


def inspect(
    file: opt.Artifact,
    heads: Annotated[
        bool,
        typer.Option(
            "--heads",
            help="Maps of entries and errors by layer and head, and where kept keys come from.",
        ),
    ] = False,
    layers: opt.LayerTable = False,
    plot: opt.PlotHeads = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Show what an artifact holds, and what made it.

    FILE is a prefill or compact artifact. The model is not needed.

    \b
      amkv inspect doc.amkv
      amkv inspect doc.amkv --heads
      amkv inspect doc.amkv --plot doc.html
    """
    console = Console(json, quiet, debug)
    if plot is not None:
        picture.require(plot)
    with open_artifact(file) as artifact, _checked(file):
        record = describe(artifact, file)
        found = maps(artifact) if heads or plot is not None else []
        if plot is not None:
            picture.draw(record, found, kept_from(artifact, picture.PARTS), plot)
    lines = list(_summary(record))
    if layers:
        lines += ["", *_details(record), "", *_table(record["layers"])]
    if heads:
        lines += ["", *_maps(record, found)]
    console.result("\n".join(lines), record)
    if plot is not None:
        console.note(f"wrote {plot}")


@contextmanager
def _checked(path: Path) -> Iterator[None]:
    """Reports what is wrong with a tensor read inside the block."""
    try:
        yield
    except FormatError as error:
        raise ArtifactError(f"{path} is not a valid .amkv file: {error}") from error


def _maps(record: dict[str, Any], found: Sequence[HeadMap]) -> Iterator[str]:
    """The output of --heads, as wide as the terminal."""
    yield from draw(found, columns(sys.stdout), coloured(sys.stdout))
    if record["kept_from"] is not None:
        yield ""
        yield from strip(record["kept_from"], record["tokens"], not _shows_bars())


def _shows_bars() -> bool:
    """Whether the output's encoding has the characters for bars."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


_LONG = ("layers", "weights")
"""Fields of `model` that the record has elsewhere, or not at all."""


def describe(artifact: AmkvFile, path: Path) -> dict[str, Any]:
    """The record that `inspect --json` prints; `docs/json.md` describes it."""
    manifest = artifact.manifest
    low, mean, high = stored_range(manifest["model"]["layers"], manifest["stored"])
    record: dict[str, Any] = {
        "file": str(path),
        "kind": artifact.kind,
        "version": manifest["version"],
        "document": manifest["source"],
        "tokens": artifact.logical_length,
        "document_tokens": manifest["document_end"] - manifest["document_start"],
        "boundary": manifest["boundary"],
        "model": {k: v for k, v in manifest["model"].items() if k not in _LONG},
        "tokenizer": manifest["tokenizer"],
        "file_bytes": path.stat().st_size,
        "stored_bytes": payload_bytes(artifact),
        "full_bytes": artifact.full_bytes,
        "store": artifact.store,
        "ratio": round(artifact.ratio, 4),
        "whole_ratio": round(whole_ratio(artifact), 4),
        "stored_per_head": {"min": low, "mean": mean, "max": high},
        "layers": [_layer(artifact, i) for i in range(len(artifact.layers))],
        "document_end": manifest["document_end"],
        "conversation": _turns(manifest),
        "kept_from": kept_from(artifact, STRIP),
        "states": [
            {
                "layer": state["layer"],
                "name": state["name"],
                "bytes": artifact.tensors[state_tensor(n)].nbytes,
            }
            for n, state in enumerate(manifest.get("states", []))
        ],
        "created": manifest["created"],
        "tools": manifest["tools"],
        "payload_hash": manifest["payload_hash"],
    }
    if artifact.kind == "compact":
        for name in ("requested", "seed", "queries"):
            record[name] = manifest[name]
        record["method"] = manifest["method"]["name"]
        record["budget"] = manifest["budget"]["name"]
        record["fit_errors"] = fit_errors(manifest)
    return record


def _turns(manifest: Mapping[str, Any]) -> int | None:
    """Questions in a conversation compacted into the context; the field may hold anything."""
    found = manifest.get("conversation")
    turns = found.get("turns") if isinstance(found, dict) else None
    return turns if type(turns) is int and turns > 0 else None


def _layer(artifact: AmkvFile, index: int) -> dict[str, Any]:
    layer = artifact.layers[index]
    errors = artifact.manifest.get("fit_errors", {})
    known = {
        name: statistics.fmean(layers[index]) for name, layers in errors.items() if layers[index]
    }
    return {
        "type": layer.type,
        "window": layer.window,
        "kv_heads": layer.kv_heads,
        "key_dim": layer.key_dim,
        "value_dim": layer.value_dim,
        "stored": list(layer.stored),
        "store": layer.store,
        "fit_errors": known,
    }


def _summary(record: dict[str, Any]) -> Iterator[str]:
    """What a person wants to know first, in 80 columns."""
    for label, value in _facts(record):
        yield f"{label:<10}{printable(str(value))}"


def _facts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    source, model = record["document"], record["model"]
    yield "file", f"{record['file']}, {bytes_text(record['file_bytes'])}"
    pages = f"{record['document_tokens']:,} tokens, {source['characters']:,} characters"
    yield "document", f"{source['name']}: {pages}"
    said = record["tokens"] - record["document_end"]
    if said > 0:
        turns = record["conversation"]
        about = "" if turns is None else f"{turns} questions and answers, "
        yield "", f"and what was said about it: {about}{said:,} tokens"
    yield "model", f"{model['id']}{_revision(model)}, {model['dtype']}"
    if record["kind"] == "prefill":
        yield "holds", f"every key and value, {bytes_text(record['stored_bytes'])}"
        return
    full, stored = bytes_text(record["full_bytes"]), bytes_text(record["stored_bytes"])
    bits = "" if record["store"] in (NATIVE, MIXED) else f", numbers in {record['store']}"
    smaller = f"{record['ratio']:.1f}× smaller{in_all(record['ratio'], record['whole_ratio'])}"
    yield "size", f"{smaller}: {full} → {stored}{bits}"
    if record["store"] == MIXED:
        said = wrap(stores_text([layer["store"] for layer in record["layers"]]), 68)
        for label, line in zip_longest(["numbers"], said, fillvalue=""):
            yield label, f"in {line}" if label else line
    per = record["stored_per_head"]
    yield "entries", f"{per['mean']:,.0f} a head ({per['min']:,} to {per['max']:,})"
    queries, asked = record["queries"], record["requested"]
    size = f"ratio {asked['ratio']:.4g}" if "ratio" in asked else f"{asked['tokens']:,} a head"
    yield "made", f"by {record['method']}, budget {record['budget']}, asked for {size}"
    yield "queries", f"{queries['source']}, {queries['count']:,} a head"
    known = record["fit_errors"]
    if known:
        for label, name in zip_longest(["errors"], sorted(known)[::-1], fillvalue=""):
            yield label, _error(name, known[name])


def _error(name: str, found: dict[str, float]) -> str:
    mean, most = (_short_error(found[key]) for key in ("mean", "max"))
    return f"{name} {mean} on average, {most} in the worst head"


def _short_error(error: float) -> str:
    """An error with two digits, or as it is where it is large."""
    return f"{error:.2g}" if error < 10 else error_text(error)


def _revision(model: dict[str, Any]) -> str:
    return f" at {model['revision'][:12]}" if model["revision"] else ""


def _details(record: dict[str, Any]) -> Iterator[str]:
    """What is looked up only now and then."""
    tools = ", ".join(f"{name} {number}" for name, number in record["tools"].items())
    facts = [
        ("format", f"{record['kind']}, {record['version']}, {record['boundary']}"),
        ("model", f"{record['model']['architecture']}"),
        (
            "tokens",
            f"{record['tokens']:,}, of which {record['document_tokens']:,} are the document",
        ),
        ("bytes", f"{record['stored_bytes']:,} stored of {record['full_bytes']:,} in full"),
        ("created", f"{record['created']}"),
        ("tools", tools),
    ]
    if record["states"]:
        layers = len({state["layer"] for state in record["states"]})
        size = bytes_text(sum(state["bytes"] for state in record["states"]))
        facts.append(("states", f"of {layers} layers without keys and values, {size}, as they are"))
    facts.append(("payload", record["payload_hash"].removeprefix("sha256:")))
    for label, value in facts:
        yield f"{label:<10}{printable(value)}"


def _table(layers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Entries per head of each layer, and the mean of its heads' errors."""
    names = list(dict.fromkeys(name for layer in layers for name in layer["fit_errors"]))[:2]
    heading = f"{'layer':>5}  {'type':<8}{'heads':>5} {'min':>8} {'mean':>10} {'max':>8}"
    yield heading + "".join(f" {name[:8] + ' err':>13}" for name in names)
    for i, layer in enumerate(layers):
        stored = layer["stored"]
        row = (
            f"{i:>5}  {layer['type']:<8}{layer['kv_heads']:>5} {min(stored):>8,} "
            f"{statistics.fmean(stored):>10,.1f} {max(stored):>8,}"
        )
        for name in names:
            error = layer["fit_errors"].get(name)
            small = error is not None and error < 10
            row += f" {f'{error:.3g}' if small else error_text(error):>13}"
        yield row
