"""Numbers with their units, for people."""

from __future__ import annotations


def bytes_text(count: int | float) -> str:
    """A number of bytes for people, in powers of 1000: `512 B`, `2.6 MB`."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:,.3g} TB"


def seconds_text(seconds: float) -> str:
    """A duration for people: `0.3 s`, `12 s`, `2 min 05 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
