"""`amkv verify`: checks whether files are valid artifacts, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from amcli.commands import options as opt
from amcli.commands.screen.console import Console
from amcli.commands.screen.terminal import printable
from amcli.commands.shared import load, work
from amcli.errors import AmkvError, ArtifactError, ModelMismatchError, UsageError
from amcli.system.files import looks_like_artifact
from amcli.system.units import bytes_text
from amkv_format import AmkvFile, FormatError

VALID, INVALID, UNREADABLE, MISFIT = "valid", "invalid", "unreadable", "misfit"


@dataclass
class Finding:
    """The result for one file.

    status  `valid`, `invalid`, `unreadable`, or `misfit`: valid, but made for another model
    code, offset  of an invalid file, as `amkv-v1.md` lists them; the offset is in bytes, None
            if the fault has no single place
    differs  why it does not fit the model; None if no model was named
    untold   what the file does not say, so that it cannot be compared; None if no model was named
    """

    path: Path
    status: str = VALID
    code: str | None = None
    offset: int | None = None
    message: str | None = None
    kind: str | None = None
    version: str | None = None
    file_bytes: int | None = None
    differs: list[str] | None = None
    untold: list[str] | None = None

    def record(self) -> dict[str, Any]:
        """The finding as JSON."""
        rest = {name: value for name, value in vars(self).items() if name != "path"}
        return {"file": str(self.path), **rest}

    def line(self) -> str:
        """The finding for people, in one line."""
        if self.status == VALID:
            size = bytes_text(self.file_bytes or 0)
            told = f"{self.path}: ok ({self.kind}, format {self.version}, {size})"
            if not self.untold:
                return told
            return f"{told}; it does not say with which weights it was made, so they may be others"
        if self.status == INVALID:
            place = "" if self.offset is None else f" at byte {self.offset}"
            return f"{self.path}: {self.code}{place}: {self.message}"
        return f"{self.path}: {self.message}"


def verify(
    files: opt.Artifacts,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Read every tensor too: the payload's hash, and that numbers are finite."
        ),
    ] = False,
    model: opt.Model = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Check that files are valid artifacts; say what is wrong, and where.

    Structure, manifest, token ids and biases are checked without reading keys
    and values; --deep reads them all. With --model also whether the files fit
    that model: its weights, configuration, tokenizer and chat template. All
    files are checked, whatever is wrong with one of them.

    \b
      amkv verify doc.amkv
      amkv verify --deep *.amkv
      amkv verify doc.amkv --model Qwen/Qwen3-4B
    """
    console = Console(json, quiet, debug)
    with console.progress() as progress:
        progress.start("verify", len(files))
        found = []
        for path in files:
            found.append(examine(path, deep))
            progress.advance()
    if model is not None and any(x.status == VALID for x in found):
        _compare(console, found, model, device, dtype)
    record = {
        "valid": all(x.status == VALID for x in found),
        "deep": deep,
        "model": model,
        "files": [x.record() for x in found],
    }
    console.result(printable("\n".join(x.line() for x in found)), record)
    error = _summary(found, model)
    if error is not None:
        raise error


def examine(path: Path, deep: bool) -> Finding:
    """Opens and verifies one file."""
    found = Finding(path)
    try:
        with AmkvFile.open(path) as file:
            found.kind, found.version = file.kind, file.manifest["version"]
            found.file_bytes = path.stat().st_size
            file.verify(deep)
    except FormatError as error:
        found.status, found.code = INVALID, str(error.code)
        found.message, found.offset = error.message, error.offset
        if path.is_file() and not looks_like_artifact(path):
            found.message = f"this is something else: {error.message}"
    except FileNotFoundError:
        found.status, found.message = UNREADABLE, "no such file"
    except OSError as error:
        found.status, found.message = UNREADABLE, f"cannot be read: {error.strerror}"
    return found


def _compare(
    console: Console, found: Sequence[Finding], model: str, device: str | None, dtype: str | None
) -> None:
    """Fills in whether the valid files fit a model."""
    with work(console) as progress:
        from amcli.pipeline.contexts.opening import misfits
        from amcli.storage.artifacts import Artifact

        loaded = load(progress, model, device, dtype)
        for one in found:
            if one.status == VALID:
                with Artifact.open(one.path) as artifact:
                    one.differs = misfits(artifact, loaded)
                    one.untold = loaded.untold(artifact.manifest["model"])
                if one.differs:
                    one.status = MISFIT
                    one.message = f"does not fit {model}: {'; '.join(one.differs)}"


def _summary(found: Sequence[Finding], model: str | None) -> AmkvError | None:
    """The error to exit with: that of the worst file."""

    def said(status: str, one: str, several: str) -> str | None:
        wrong = [x for x in found if x.status == status]
        if len(found) == 1 and wrong:
            return f"{wrong[0].path} {one}"
        return f"{len(wrong)} of {len(found)} files {several}" if wrong else None

    if message := said(INVALID, "is not a valid .amkv file", "are not valid .amkv files"):
        return ArtifactError(
            message, "copy the file again, or make it again with amkv prefill or amkv compact"
        )
    if message := said(MISFIT, f"does not fit {model}", f"do not fit {model}"):
        return ModelMismatchError(message, "amkv inspect says which model a file was made for")
    if message := said(UNREADABLE, "cannot be read", "cannot be read"):
        return UsageError(message, "check the path")
    return None
