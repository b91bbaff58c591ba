"""Draws the rooms of the code and the arrows between them: `python docs/rooms.py`.

The picture in architecture.md, from the imports as they are, lazy ones and those for types
included. An arrow that others imply is left out: where `a` imports `b` and `b` imports `c`, no
line is drawn from `a` to `c`. Needs grimp, which import-linter brings.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grimp

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "pictures" / "rooms.svg"
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "formats")]  # this tree, whatever is installed

SAYS = {
    "commands": "the command line",
    "api": "the Python API",
    "evaluation": "suites, metrics, plots",
    "conversions": "to and from other tools",
    "trainer": "how pocket was trained",
    "generator": "generated documents",
    "serving": "batches of contexts",
    "pipeline.talk": "conversations",
    "pipeline.compaction": "plan, budgets, fits",
    "pipeline.queries": "reference queries",
    "pipeline.contexts": "documents in a cache",
    "models": "transformers, cache, attention",
    "matching": "the maths",
    "storage": "artifacts as tensors",
    "kernels": "Triton, and without it",
    "pocket": "the model in the box",
    "entries": "keys, biases, values",
    "system": "files, settings, signals",
    "errors": "what a user is told",
    "amkv_format": "bytes; no library at all",
}

WIDTH, HEIGHT = 196, 44
ACROSS, DOWN = 216, 84


def arrows() -> dict[str, set[str]]:
    """Which room imports which."""
    graph = grimp.build_graph("amcli", "amkv_format")

    def room(module: str) -> str | None:
        parts = module.split(".")
        if parts[0] == "amkv_format":
            return "amkv_format"
        if len(parts) == 1 or parts[1] == "__main__":
            return None
        return ".".join(parts[1:3]) if parts[1] == "pipeline" and parts[2:] else parts[1]

    found: dict[str, set[str]] = {}
    for module in sorted(graph.modules):
        here = room(module)
        if here in (None, "pipeline"):
            continue
        found.setdefault(str(here), set())
        for other in graph.find_modules_directly_imported_by(module):
            there = room(other)
            if there not in (here, None, "pipeline"):
                found[str(here)].add(str(there))
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that others imply."""

    def reach(room: str) -> set[str]:
        return {room}.union(*(reach(other) for other in graph[room])) if graph[room] else {room}

    return {
        room: {
            other
            for other in below
            if not any(other in reach(between) for between in below - {other})
        }
        for room, below in graph.items()
    }


def rows(graph: dict[str, set[str]]) -> list[list[str]]:
    """The rooms, each as low as what it imports lets it be; the top row first. There must be no
    circle: see `lint-imports`."""

    def height(room: str) -> int:
        return 1 + max((height(other) for other in graph[room]), default=-1)

    found: list[list[str]] = [[] for _ in range(1 + max(map(height, graph)))]
    for room in sorted(graph):
        found[height(room)].append(room)
    return found[::-1]


def ordered(rows: list[list[str]], graph: dict[str, set[str]]) -> list[list[str]]:
    """Each row in the order of the middles of what is connected to it, so that few lines cross."""
    place = {room: (k + 1) / (len(row) + 1) for row in rows for k, room in enumerate(row)}
    for _ in range(8):
        for row in rows:
            near = {
                room: [place[x] for x in graph[room]]
                + [place[x] for x, below in graph.items() if room in below]
                for room in row
            }
            row.sort(key=lambda room: (sum(near[room]) / max(1, len(near[room])), room))
            place |= {room: (k + 1) / (len(row) + 1) for k, room in enumerate(row)}
    return rows


def svg() -> str:
    """The picture."""
    graph = reduced(arrows())
    lines = ordered(rows(graph), graph)
    width = ACROSS * max(map(len, lines)) + 24
    at = {
        room: (width / 2 + ACROSS * (k - (len(row) - 1) / 2), 36 + DOWN * r)
        for r, row in enumerate(lines)
        for k, room in enumerate(row)
    }
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {DOWN * len(lines)}" '
        'font-family="ui-sans-serif, system-ui, sans-serif" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#64748b"/></marker></defs>',
        f'<rect width="{width}" height="{DOWN * len(lines)}" fill="#ffffff"/>',
    ]
    for room in sorted(graph):
        x, y = at[room]
        for other in sorted(graph[room]):
            u, v = at[other]
            y_0, y_1 = y + HEIGHT / 2, v - HEIGHT / 2 - 2
            bend = (y_1 - y_0) / 2
            out.append(
                f'<path d="M{x:.0f} {y_0:.0f}C{x:.0f} {y_0 + bend:.0f} {u:.0f} {y_1 - bend:.0f} '
                f'{u:.0f} {y_1:.0f}" fill="none" stroke="#64748b" stroke-width="1.3" '
                'marker-end="url(#tip)"/>'
            )
    for room, (x, y) in sorted(at.items()):
        name = room.replace(".", "/")
        out.append(
            f'<rect x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" '
            f'height="{HEIGHT}" rx="8" fill="#f1f5f9" stroke="#334155"/>'
            f'<text x="{x:.0f}" y="{y - 3:.0f}" font-size="14" font-weight="600" '
            f'fill="#0f172a">{name}</text>'
            f'<text x="{x:.0f}" y="{y + 14:.0f}" font-size="11.5" '
            f'fill="#475569">{SAYS[room]}</text>'
        )
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
