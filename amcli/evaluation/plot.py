"""Recall and KL against the real ratio, one line per method: a picture that reads well in print.

Lines differ in colour, marker and dash, so they can be told apart in black and white; the colours
are those of Okabe and Ito, which colour-blind readers can tell apart. Needs matplotlib, which is
imported only here.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from amcli.errors import UsageError
from amcli.evaluation.makers import FULL, NONE
from amcli.evaluation.results import Results, plural
from amcli.system.files import output_errors

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES = ("-", "--", "-.", ":")
_COLUMNS = 5
"""Columns of the legend."""

_BANDS = 4
"""Intervals are drawn for up to this many methods; more would hide each other."""

_SMALLEST_KL = 1e-5
"""Below this the KL axis is linear, so that it can show 0."""


def require() -> None:
    """Raises UsageError, with what to install, when there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "a plot needs matplotlib", "pip install 'amkv[plots]'", code="plot-package-missing"
        )


def draw(results: Results, path: Path) -> None:
    """Writes the picture, in the format of the file's suffix (`.png`, `.pdf`, `.svg`).

    Two panels: score (or top-1 agreement, if a suite has no score) and KL in nats per token.
    """
    require()
    figures: Any = importlib.import_module("matplotlib.figure")
    rows = [row for row in results.rows() if row["kind"] == "all"]
    scored = any(row["recall"] is not None for row in rows)
    entries = len({row["method"] for row in rows})
    height = 4.0 + 0.2 * -(-entries // _COLUMNS)  # the legend's lines take space at the bottom
    figure = figures.Figure(figsize=(10, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, rows, "recall" if scored else "agreement")
    left.set_ylabel("recall" if scored else "top-1 agreement with the full context")
    left.set_ylim(-0.03, 1.05)
    _panel(right, rows, "kl")
    right.set_ylabel("KL to full (nats per answer token)")
    right.set_yscale("symlog", linthresh=_SMALLEST_KL, linscale=0.4)
    right.set_ylim(bottom=-_SMALLEST_KL / 5)
    for axes in (left, right):
        _ratio_axis(axes, rows)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=_COLUMNS, frameon=False,
        fontsize=9,
    )  # fmt: skip
    figure.suptitle(_title(results), fontsize=10)
    with output_errors(path):
        figure.savefig(path, dpi=200)


def _title(results: Results) -> str:
    settings = results.settings
    lengths = [document["tokens"] for document in results.documents]
    mean = round(sum(lengths) / len(lengths))
    count = sum(map(len, results.questions))
    model = Path(settings["model"]).name if Path(settings["model"]).is_absolute() else None
    return (
        f"{settings['suite']}, {model or settings['model']}: {plural(len(lengths), 'document')} "
        f"of about {mean:,} tokens, {plural(count, 'question')}"
    )


def _panel(axes: Any, rows: list[dict[str, Any]], metric: str) -> None:
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m not in (FULL, NONE)]
    for i, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method and row["real_ratio"]]
        own = sorted((row for row in own if row[metric]), key=lambda row: row["real_ratio"])
        if not own:
            continue
        x = [row["real_ratio"] for row in own]
        value, low, high = ([row[metric][p] for row in own] for p in ("value", "low", "high"))
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(
            x, value, color=colour, marker=_MARKERS[i % len(_MARKERS)], markersize=5,
            linestyle=_DASHES[(i // len(_COLOURS)) % len(_DASHES)], linewidth=1.4, label=method,
        )  # fmt: skip
        if len(methods) <= _BANDS:
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    for method, dash, label in ((FULL, "-", "full context"), (NONE, (0, (1, 2)), "no context")):
        row = next((row for row in rows if row["method"] == method), None)
        if row is None or not row[metric]:
            continue
        axes.axhline(row[metric]["value"], color="0.35", linewidth=1.2, linestyle=dash, label=label)


def _ratio_axis(axes: Any, rows: list[dict[str, Any]]) -> None:
    ticker: Any = importlib.import_module("matplotlib.ticker")
    axes.set_xscale("log")
    axes.set_xlabel("full bytes ÷ stored bytes")
    asked = sorted({row["ratio"] for row in rows if row["ratio"]})
    axes.xaxis.set_major_locator(ticker.FixedLocator(asked))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
