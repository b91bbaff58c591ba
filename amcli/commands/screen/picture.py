"""`inspect --plot`: entries and errors by layer and head, and where kept keys come from.

Either a picture drawn by matplotlib, or a self-contained web page: one file, no scripts, readable
on light and dark screens, showing the number of the head under the pointer.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from amcli.commands.heads import HeadMap
from amcli.errors import UsageError
from amcli.system.files import output_errors, write_whole
from amcli.system.units import bytes_text

PARTS = 256
"""Parts of the text, each with its own bar."""

PICTURES = (".png", ".svg", ".pdf")
PAGE = ".html"

_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def require(path: Path) -> None:
    """Raises UsageError for another suffix, and if matplotlib is needed but missing."""
    ending = path.suffix.lower()
    if ending not in (*PICTURES, PAGE):
        known = ", ".join((*PICTURES, PAGE))
        raise UsageError(f"--plot {path.name}: unknown ending {ending!r}", f"use one of {known}")
    if ending != PAGE and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            f"--plot {path.name} needs matplotlib", "pip install 'amkv[plots]', or --plot FILE.html"
        )


def draw(
    record: dict[str, Any], found: Sequence[HeadMap], kept: Sequence[int] | None, path: Path
) -> None:
    """Writes the picture or the page; `record` is the one from `inspect --json`."""
    if path.suffix.lower() == PAGE:
        write_whole(path, page(record, found, kept).encode(), overwrite=True)
    else:
        _picture(record, found, kept, path)


def _title(record: dict[str, Any]) -> str:
    size = bytes_text(record["stored_bytes"])
    made = "" if record["kind"] == "prefill" else f", {record['ratio']:.1f}× smaller"
    return f"{record['document']['name']}: {record['tokens']:,} tokens in {size}{made}"


# ---- a picture -------------------------------------------------------------------------------


def _picture(
    record: dict[str, Any], found: Sequence[HeadMap], kept: Sequence[int] | None, path: Path
) -> None:
    figures: Any = importlib.import_module("matplotlib.figure")
    rows = len(found[0].layers)
    height = min(16.0, 2.0 + 0.22 * rows) + (1.6 if kept else 0.0)
    figure = figures.Figure(figsize=(3.2 * len(found) + 0.8, height), layout="constrained")
    figure.suptitle(_title(record), fontsize=10)
    upper = figure
    if kept:
        upper, lower = figure.subfigures(2, 1, height_ratios=(height - 1.6, 1.6))
        axes = lower.subplots()
        step = record["tokens"] / len(kept)
        axes.bar([i * step for i in range(len(kept))], kept, width=step, align="edge")
        axes.set_xlim(0, record["tokens"])
        axes.set_xlabel("token of the text")
        axes.set_ylabel("kept keys")
    for axes, each in zip(upper.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        _map(figure, axes, each)
    with output_errors(path):
        figure.savefig(path, dpi=144)


def _map(figure: Any, axes: Any, found: HeadMap) -> None:
    """One map with its scale, which is logarithmic."""
    colours: Any = importlib.import_module("matplotlib.colors")
    wide = max(map(len, found.rows))
    nan = float("nan")
    table = [
        [nan if v is None else float(v) for v in row] + [nan] * (wide - len(row))
        for row in found.rows
    ]
    low, high = found.range
    low = max(low, 1.0 if found.whole else high * 1e-4, 1e-12)
    scale = colours.LogNorm(low, max(high, low * 1.001))
    drawn = axes.imshow(
        [[max(v, low) for v in row] for row in table], aspect="auto", norm=scale, cmap="viridis"
    )
    axes.set_title(found.name, fontsize=10)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    step = max(1, len(found.layers) // 12)
    axes.set_yticks(range(0, len(found.layers), step), found.layers[::step])
    axes.set_xticks(range(0, wide, max(1, wide // 8)))
    top = max(high, low * 1.001)
    bar = axes.figure.colorbar(drawn, ax=axes)
    ticks = [low * (top / low) ** (i / 4) for i in range(5)]
    bar.set_ticks(ticks, labels=[found.text(v) for v in ticks])
    bar.minorticks_off()


# ---- a page ----------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin: 0 0 .4rem; }
.maps { display: flex; flex-wrap: wrap; gap: 2rem; }
table { border-collapse: collapse; font-size: .75rem; }
th { font-weight: normal; padding: 0 .5em 0 0; text-align: right; opacity: .7; }
td { width: 1.6em; height: 1.3em; padding: 0; }
.ramp { width: 12em; height: .8em; display: inline-block; vertical-align: middle; }
svg { width: 100%; height: 7rem; display: block; } rect { fill: #21918c; }
.ends { display: flex; justify-content: space-between; font-size: .75rem; opacity: .7; }
"""


def page(record: dict[str, Any], found: Sequence[HeadMap], kept: Sequence[int] | None) -> str:
    """The same as a single HTML file."""
    return "\n".join(_page(record, found, kept)) + "\n"


def _page(
    record: dict[str, Any], found: Sequence[HeadMap], kept: Sequence[int] | None
) -> Iterator[str]:
    title, model = escape(_title(record)), record["model"]
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    yield f"<h1>{title}</h1>"
    made = [f"model {model['id']}", model["dtype"]]
    if record["kind"] == "compact":
        made += [f"method {record['method']}", f"budget {record['budget']}", record["store"]]
    yield f"<p>{escape(', '.join(made))}</p>"
    yield '<div class="maps">'
    for each in found:
        yield from _table(each)
    yield "</div>"
    if kept:
        yield "<h2>kept keys along the text</h2>"
        yield from _bars(record["tokens"], kept)


def _table(found: HeadMap) -> Iterator[str]:
    low, high = (found.text(v) for v in found.range)
    ramp = ", ".join(_colour(i / 4) for i in range(5))
    yield f"<div><h2>{escape(found.name)}</h2><table>"
    heads = "".join(f"<th>{h}" for h in range(max(map(len, found.rows))))
    yield f"<tr><th>layer{heads}"
    for layer, row in zip(found.layers, found.rows, strict=True):
        cells = "".join(_cell(found, layer, head, value) for head, value in enumerate(row))
        yield f"<tr><th>{layer}{cells}"
    yield "</table>"
    yield (
        f'<p>{low} <span class="ramp" style="background:linear-gradient(90deg, {ramp})"></span> '
        f"{high}</p></div>"
    )


def _cell(found: HeadMap, layer: int, head: int, value: float | None) -> str:
    if value is None:
        return "<td>"
    says = f"layer {layer}, head {head}: {found.text(value)}"
    return f'<td style="background:{_colour(found.share(value))}" title="{says}">'


def _bars(tokens: int, kept: Sequence[int]) -> Iterator[str]:
    top = max(*kept, 1)
    yield f'<svg viewBox="0 0 {len(kept)} 100" preserveAspectRatio="none" role="img">'
    for i, n in enumerate(kept):
        height = round(100 * n / top, 2)
        first, last = i * tokens // len(kept), (i + 1) * tokens // len(kept)
        yield (
            f'<rect x="{i}" y="{100 - height:g}" width="1" height="{height:g}">'
            f"<title>tokens {first:,} to {last:,}: {n:,}</title></rect>"
        )
    yield f'</svg><div class="ends"><span>0</span><span>token {tokens:,}</span></div>'


def _colour(share: float) -> str:
    """A colour of the ramp, `share` from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    i = min(int(place), len(_VIRIDIS) - 2)
    mixed = [
        round(a + (b - a) * (place - i)) for a, b in zip(_VIRIDIS[i], _VIRIDIS[i + 1], strict=True)
    ]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
