"""Reads the document: files or standard input, checked before any work starts."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amcli.errors import UsageError
from amcli.pipeline.contexts import readers
from amcli.system.files import input_errors

STDIN = "-"

# Allowed in file names but not in manifests: separators, control and surrogate characters.
_UNFIT = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")

_LONGEST_NAME = 100


@dataclass(frozen=True)
class File:
    """One file that a document was read from; `pages` is None where it has none."""

    name: str
    characters: int
    pages: int | None = None

    def record(self) -> dict[str, Any]:
        """The file as JSON has it."""
        return {"name": self.name, "characters": self.characters, "pages": self.pages}


@dataclass(frozen=True)
class Source:
    """A document: its text, the name it is known by (a bare file name), and its files in order."""

    name: str
    text: str
    files: tuple[File, ...] = ()

    @property
    def stem(self) -> str:
        """The first file's name without its last suffix: outputs are named after it."""
        name = self.files[0].name if self.files else self.name
        return Path(name).stem or name

    def manifest(self) -> dict[str, Any]:
        """The `source` field of an artifact's manifest."""
        data = self.text.encode()
        record = {
            "name": self.name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "characters": len(self.text),
            "bytes": len(data),
        }
        if len(self.files) > 1:
            record["files"] = [file.record() for file in self.files]
        return record


def bare_name(path: Path) -> str:
    """A file's name as a manifest may hold it."""
    return _UNFIT.sub("_", path.name)


def read_source(*paths: str) -> Source:
    """Reads a document from files, or from standard input for `-`.

    Several files make one text, in the order given, each under a line with its name. Raises
    UsageError for a missing file, a folder, no text, and what `readers.read` refuses.
    """
    found = [_read(path) for path in paths]
    files = tuple(file for file, _ in found)
    if len(found) == 1:
        return Source(files[0].name, found[0][1], files)
    text = "\n\n".join(f"===== {file.name} =====\n\n{text}" for file, text in found)
    name = ", ".join(file.name for file in files)
    if len(name) > _LONGEST_NAME:
        name = f"{files[0].name[:_LONGEST_NAME]} and {len(files) - 1} more"
    return Source(name, text, files)


def _read(path: str) -> tuple[File, str]:
    """A file and its text."""
    if path == STDIN:
        if sys.stdin is None:
            raise UsageError(
                "standard input is closed",
                "pipe a document into it, or name a file",
                code="stdin-closed",
                field="path",
            )
        name, data = "stdin.txt", sys.stdin.buffer.read()
    else:
        name, data = bare_name(Path(path)), _bytes(Path(path))
    text, pages = readers.read(name, data)
    if not text:
        raise UsageError(
            f"{name} is empty",
            "give a document with some text in it",
            code="empty-document",
            field="path",
            path=name,
        )
    return File(name, len(text), pages), text


def _bytes(path: Path) -> bytes:
    with input_errors(path, "check the path, or use - for a pipe"):
        try:
            return path.read_bytes()
        except IsADirectoryError as error:
            raise UsageError(
                f"{path} is a folder, not a text file",
                "name one file in it",
                code="not-a-file",
                field="path",
                path=path,
            ) from error
