"""What one command remembers for the next: where the last prefill is."""

from __future__ import annotations

import os
from pathlib import Path

from amcli.errors import UsageError


def state_folder() -> Path:
    """The folder for what one command remembers for the next; it may not exist yet."""
    base = os.environ.get("XDG_STATE_HOME", "")
    # The specification says to ignore relative paths.
    folder = Path(base) if os.path.isabs(base) else Path("~/.local/state").expanduser()
    return folder / "amkv"


def _memory() -> Path:
    return state_folder() / "last-prefill"


def remember(artifact: Path) -> bool:
    """Remembers the path of a prefill for `compact`; False if that is not possible."""
    try:
        memory = _memory()
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_bytes(os.fsencode(artifact.absolute()) + b"\n")
    except (OSError, RuntimeError):  # no home folder, or not writable
        return False
    return True


def last_prefill() -> Path:
    """The path kept by `remember`; raises UsageError if there is none, or no file there."""
    try:
        kept = _memory().read_bytes().removesuffix(b"\n")
    except (OSError, RuntimeError):
        kept = b""
    if not kept:
        raise UsageError(
            "nothing to compact: no document was prefilled yet",
            "name a document, or prefill one first",
            code="no-prefill",
        )
    path = Path(os.fsdecode(kept))
    if not path.exists():
        raise UsageError(
            f"the last prefill, {path}, is gone",
            "name a document or another artifact",
            code="prefill-gone",
            path=path,
        )
    return path
