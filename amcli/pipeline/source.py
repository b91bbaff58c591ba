"""Reads the document: a text file or standard input, checked before any work starts."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amcli.errors import UsageError

STDIN = "-"

# What file names may hold and a manifest may not: separators, control and surrogate characters.
_UNFIT = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Source:
    """A document: its text, and the name it is known by (a bare file name)."""

    name: str
    text: str

    @property
    def stem(self) -> str:
        """The name without its last ending: outputs are named after it."""
        return Path(self.name).stem or self.name

    def manifest(self) -> dict[str, Any]:
        """The `source` field of an artifact's manifest."""
        data = self.text.encode()
        return {
            "name": self.name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "characters": len(self.text),
            "bytes": len(data),
        }


def bare_name(path: Path) -> str:
    """A file's name as a manifest may hold it."""
    return _UNFIT.sub("_", path.name)


def read_source(path: str) -> Source:
    """Reads a UTF-8 text file, or standard input for `-`.

    Raises UsageError for a missing file, a folder, binary data, another encoding, or no text.
    """
    if path == STDIN:
        if sys.stdin is None:
            raise UsageError("standard input is closed", "pipe a document into it, or name a file")
        name, data = "stdin.txt", sys.stdin.buffer.read()
    else:
        name, data = bare_name(Path(path)), _read(Path(path))
    if b"\0" in data:
        raise UsageError(
            f"{name} is binary data, not text (a zero byte at {data.index(0)})",
            "give a plain text file in UTF-8",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 text (byte {data[error.start]:#04x} at {error.start})",
            "convert it first, for example with iconv -f latin1 -t utf-8",
        ) from error
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise UsageError(f"{name} is empty", "give a document with some text in it")
    return Source(name, text)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"no such file: {path}", "check the path, or use - for a pipe") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder, not a text file", "name one file in it") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "check the path") from error
