"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets

# File systems without hard links (FAT, some network shares) answer link() with one of these.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# The folder cannot be opened or synced; the file in it is fine.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EISDIR)


def create_temporary(path: str) -> tuple[int, str]:
    """A new empty file beside `path`: its descriptor, open for reading and writing, and its name.

    The name is `.NAME.XXXXXXXX.tmp`; the mode is that of any new file, 0666 less the umask.
    Raises OSError naming `path`, which is the name the user knows.
    """
    folder, name = os.path.split(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    while True:
        # Cut, because the longest allowed name would otherwise exceed the file system's limit.
        temporary = os.path.join(folder, f".{name[:48]}.{secrets.token_hex(4)}.tmp")
        try:
            return os.open(temporary, flags, 0o666), temporary
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None


def exists_error(path: str) -> FileExistsError:
    """The error for a target that exists and must not be replaced."""
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def publish(temporary: str, path: str, overwrite: bool) -> None:
    """Gives a finished file its name, in one step that either happens or does not.

    Raises FileExistsError when `overwrite` is false and `path` exists, even if only since a moment
    ago. Other OSErrors are raised as they come; removing `temporary` is up to the caller.
    """
    if overwrite:
        os.replace(temporary, path)
    else:
        _publish_new(temporary, path)
    _sync_folder(os.path.dirname(path) or ".")


def _publish_new(temporary: str, path: str) -> None:
    # rename() would silently replace what is there; link() refuses.
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise exists_error(path) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        os.unlink(temporary)
        return
    # Next best: claim the name with an empty file, then replace it.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        os.replace(temporary, path)
    except BaseException:
        os.unlink(path)
        raise


def _sync_folder(folder: str) -> None:
    """Makes the new name survive a power cut, where the system can do that."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
