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


def error_text(error: float | None) -> str:
    """A relative error for people, in at most six characters: `0.042`, `12.3`, `5,650`, `1.2e9`."""
    if error is None:
        return "–"
    if not abs(error) < float("inf"):
        return str(error)
    if error < 10:
        return f"{error:.3f}"
    rounded = float(f"{error:.3g}")
    if rounded < 1e5:
        return f"{rounded:.3g}" if rounded < 1000 else f"{rounded:,.0f}"
    digits, _, power = f"{error:.{1 if error < 9.5e99 else 0}e}".partition("e")
    return f"{digits}e{int(power)}"
