"""`amkv inspect`: says what an artifact holds, without the model and without torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from amcli.commands import completion
from amcli.commands import options as opt
from amcli.commands.summary import fit_errors, stored_range
from amcli.console import Console, bytes_text
from amcli.files import open_artifact
from amkv_format import TOKEN_IDS, AmkvFile, state_tensor


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", hidden=True, show_default=False, autocompletion=completion.artifacts
        ),
    ],
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Show what an artifact holds, and what made it.

    FILE is a prefill or compact artifact. The model is not needed.

    \b
      amkv inspect doc.amkv
    """
    console = Console(json, quiet, debug)
    with open_artifact(file) as artifact:
        record = describe(artifact, file)
    console.result("\n".join(_text(record)), record)


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
        "model": {k: v for k, v in manifest["model"].items() if k != "layers"},
        "tokenizer": manifest["tokenizer"],
        "file_bytes": path.stat().st_size,
        "stored_bytes": sum(t.nbytes for n, t in artifact.tensors.items() if n != TOKEN_IDS),
        "full_bytes": artifact.full_bytes,
        "store": artifact.store,
        "ratio": round(artifact.ratio, 4),
        "stored_per_head": {"min": low, "mean": mean, "max": high},
        "layers": [_layer(artifact, i) for i in range(len(artifact.layers))],
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
        "fit_errors": known,
    }


def _text(record: dict[str, Any]) -> Iterator[str]:
    """The record for people, in 80 columns."""
    for label, value in _facts(record):
        yield f"{label:<10}{value}"
    yield ""
    yield from _table(record["layers"])


def _facts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    source, model, tools = record["document"], record["model"], record["tools"]
    revision = f" at {model['revision'][:12]}" if model["revision"] else ""
    yield "file", record["file"]
    yield "kind", f"{record['kind']}, format {record['version']}"
    yield "document", f"{source['name']}, {source['characters']:,} characters"
    yield "tokens", f"{record['tokens']:,}, of which {record['document_tokens']:,} are the document"
    yield "model", f"{model['id']}{revision}"
    yield "", f"{model['architecture']}, {model['dtype']}"
    if record["kind"] == "compact":
        queries, asked = record["queries"], record["requested"]
        size = f"ratio {asked['ratio']:g}" if "ratio" in asked else f"{asked['tokens']:,} a head"
        yield "method", f"{record['method']}, budget {record['budget']}, seed {record['seed']}"
        yield "queries", f"{queries['source']}, {queries['count']:,} a head"
        yield "ratio", f"{record['ratio']:.2f}, asked for {size}"
        for name, found in record["fit_errors"].items():
            line = f"{name}: median {found['median']:.2g}, largest {found['max']:.2g}"
            yield "fit error", line
    how = "" if record["store"] == "native" else f", as {record['store']}"
    yield "bytes", f"{record['stored_bytes']:,} stored of {record['full_bytes']:,} in full{how}"
    yield "", f"{record['file_bytes']:,} ({bytes_text(record['file_bytes'])}) in the file"
    yield "created", f"{record['created']} by amkv {tools['amkv']}"
    if record["states"]:
        layers = len({state["layer"] for state in record["states"]})
        size = bytes_text(sum(state["bytes"] for state in record["states"]))
        yield "states", f"of {layers} layers without keys and values, {size}, as they are"
    others = ", ".join(f"{name} {number}" for name, number in tools.items() if name != "amkv")
    if others:
        yield "", others
    yield "payload", record["payload_hash"].removeprefix("sha256:")


def _table(layers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Entries per head of each layer, and the mean of its heads' errors."""
    names = list(dict.fromkeys(name for layer in layers for name in layer["fit_errors"]))[:2]
    heading = f"{'layer':>5}  {'type':<8}{'heads':>5}{'min':>9}{'mean':>11}{'max':>9}"
    yield heading + "".join(f"{name[:8] + ' err':>14}" for name in names)
    for i, layer in enumerate(layers):
        stored = layer["stored"]
        row = (
            f"{i:>5}  {layer['type']:<8}{layer['kv_heads']:>5}{min(stored):>9,}"
            f"{statistics.fmean(stored):>11,.1f}{max(stored):>9,}"
        )
        for name in names:
            error = layer["fit_errors"].get(name)
            row += f"{'–' if error is None else format(error, '.3g'):>14}"
        yield row
