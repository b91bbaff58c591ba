"""What a terminal shows after what was written to it."""

from __future__ import annotations

import re


def shown(text: str) -> str:
    """What a terminal that was wide and high enough shows after these bytes."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part[0] != "\x1b":
            rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + 1 :]
            column += 1
        elif part[-1] == "A":
            row -= int(part[2:-1] or 1)
        elif part[-1] == "K":
            rows[row] = ""
    return "\n".join(line.rstrip() for line in rows)
