"""Files on disk, checked before any work starts; failures are put in a user's words.

Standard library and `amkv_format` only, so that commands can refuse in milliseconds.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

from amcli.errors import ArtifactError, OutOfMemoryError, OutputError, UsageError
from amkv_format import AmkvFile, FormatError
from amkv_format.atomic import create_temporary, publish

EXTENSION = ".amkv"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AHEAD = "amkv-read-ahead"
"""The name of threads that read ahead."""

PIECE = 4 * 2**20
_LONGEST_HEADER = 2**32  # the first eight bytes of a text file give a larger number


def open_artifact(path: str | os.PathLike[str]) -> AmkvFile:
    """Opens `path` and checks all but the keys and values.

    Raises UsageError when it cannot be read, ArtifactError when it is not a valid artifact.
    """
    path = Path(path)
    with input_errors(path):
        try:
            file = AmkvFile.open(path)
            try:
                file.check_manifest_hash()
                file.check_beta()
            except BaseException:
                file.close()
                raise
            return file
        except FormatError as error:
            if path.is_file() and not looks_like_artifact(path):
                raise ArtifactError(
                    f"{path} is not an .amkv file",
                    "give a file that a compaction or a prefill wrote",
                    code="not-an-artifact",
                    field="path",
                    path=path,
                ) from error
            raise ArtifactError(
                f"{path} is not a valid .amkv file: {error}",
                "make it again",
                code="artifact-invalid",
                field="path",
                path=path,
            ) from error


@contextmanager
def input_errors(path: Path, missing: str = "check the path") -> Iterator[None]:
    """Turns the system's errors in reading `path` into one line and a hint: UsageError.

    missing  what to do if there is no such file
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError(
            f"no such file: {path}", missing, code="file-missing", field="path", path=path
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}",
            "check the path",
            code="file-unreadable",
            field="path",
            path=path,
        ) from error


def read_ahead(path: str | os.PathLike[str]) -> None:
    """Asks the system to read a file into its cache in the background.

    Libraries and models take seconds to load, and reading a long document's prefill from disk
    takes as long. A hint: nothing happens where the system has no such call.
    """
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return

    def ahead() -> None:
        with suppress(OSError), open(path, "rb", buffering=0) as file:
            # In small pieces: of a large one, systems read only the beginning.
            for start in range(0, os.fstat(file.fileno()).st_size, PIECE):
                advise(file.fileno(), start, PIECE, os.POSIX_FADV_WILLNEED)

    Thread(target=ahead, daemon=True, name=AHEAD).start()


def looks_like_artifact(path: Path) -> bool:
    """Whether `path` is meant as an artifact: by its name, or by the first bytes of the file."""
    if path.suffix.lower() == EXTENSION:
        return True
    try:
        if not path.is_file():  # reading from a pipe would consume the document
            return False
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < _LONGEST_HEADER


def require_writable(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Fails as writing an artifact would, before hours of work rather than after.

    Raises UsageError for an existing file or a missing folder, OutputError without permission.
    """
    path = Path(path)
    folder = path.parent
    with output_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # a rename would replace the device itself
            raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")
        if not overwrite and (path.exists() or path.is_symlink()):
            raise FileExistsError
        if not folder.is_dir():
            raise FileNotFoundError
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def require_new_folder(folder: Path) -> None:
    """Raises UsageError when a folder to be made exists or its parent does not, OutputError without
    permission."""
    if folder.exists() or folder.is_symlink():
        raise UsageError(
            f"{folder} already exists",
            "name a new folder",
            code="folder-exists",
            field="folder",
            path=folder,
        )
    with output_errors(folder):
        if not folder.parent.is_dir():
            raise FileNotFoundError
        if not os.access(folder.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_json(path: Path, record: Mapping[str, Any], overwrite: bool) -> None:
    """Writes a record, one line per field and per element of a list.

    Raises what `write_whole` does.
    """
    fields = []
    for name, value in record.items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if isinstance(value, list) and value:
            lines = [json.dumps(v, ensure_ascii=False, allow_nan=False) for v in value]
            text = "[\n  " + ",\n  ".join(lines) + "\n ]"
        fields.append(f" {json.dumps(name)}: {text}")
    write_whole(path, ("{\n" + ",\n".join(fields) + "\n}\n").encode(), overwrite)


def write_whole(path: Path, data: bytes, overwrite: bool) -> None:
    """Writes a file whole or not at all.

    Raises UsageError when it exists (unless `overwrite`) or its folder does not, and whatever else
    `output_errors` raises.
    """
    with output_errors(path):
        descriptor, temporary = create_temporary(str(path))
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, str(path), overwrite=overwrite)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


@contextmanager
def output_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the system's errors in writing `path` into one line and a hint."""
    try:
        yield
    except FileExistsError as error:
        raise UsageError(
            f"{path} already exists",
            "pass overwrite=True to replace it, or name another file",
            code="file-exists",
            field="path",
            path=path,
        ) from error
    except FileNotFoundError as error:
        folder = Path(path).parent
        raise UsageError(
            f"the folder {folder} does not exist",
            "make it, or choose another",
            code="folder-missing",
            field="path",
            folder=folder,
        ) from error
    except OSError as error:
        if error.errno in _FULL:
            raise OutOfMemoryError(
                f"no space left to write {path}",
                "free some space, or choose another disk",
                code="disk-full",
                field="path",
                path=path,
            ) from error
        raise OutputError(
            f"cannot write {path}: {error.strerror}",
            "choose another place",
            code="not-writable",
            field="path",
            path=path,
        ) from error


def unix_lines(text: str) -> str:
    """The text with every end of a line as LF: it may have been CRLF, or CR alone."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path, instead: str) -> str:
    """The text of a UTF-8 file that a user named; UsageError if it is not one, with what to do
    `instead`, or cannot be read."""
    with input_errors(path):
        try:
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path} is not UTF-8 text", instead, code="not-text", field="path", path=path
            ) from error
