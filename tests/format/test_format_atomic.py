"""A file is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest
from format_samples import fill, names, run, sample

from amkv_format import AmkvFile, Writer, write_file


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("existing", [None, b"the old file"])
def test_an_interrupted_write_leaves_the_folder_as_it_was(
    error: type[BaseException], existing: bytes | None, tmp_path: Path
) -> None:
    contents = sample()[1]
    path = tmp_path / "f.amkv"
    if existing is not None:
        path.write_bytes(existing)
    before = names(tmp_path)

    def interrupted() -> None:
        specs = [spec for spec, _ in contents]
        with Writer(path, specs, overwrite=existing is not None) as out:
            fill(out, contents[:2])
            assert len(names(tmp_path)) == len(before) + 1
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == before
    if existing is not None:
        assert path.read_bytes() == existing


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_errors_of_the_system_pass_through_and_leave_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    described, contents = sample()
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space") as caught:
        write_file(tmp_path / "f.amkv", described, contents)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_in_the_middle_of_a_tensor_leaves_nothing(tmp_path: Path) -> None:
    script = """
        import errno, resource, sys
        sys.path[:0] = sys.argv[2:]
        from amkv_format import write_file
        from format_samples import sample, fill
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        described, contents = sample("prefill", "F32")
        try:
            write_file(sys.argv[1], described, contents)
        except OSError as error:
            assert error.errno == errno.EFBIG, error
        else:
            raise SystemExit("the limit was not met")
    """
    run(script, tmp_path / "f.amkv")
    assert names(tmp_path) == []


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    described, contents = sample()
    (tmp_path / "file").write_text("x")
    for target, error in (
        (tmp_path / "absent" / "f.amkv", FileNotFoundError),
        (tmp_path / "file" / "f.amkv", NotADirectoryError),
    ):
        with pytest.raises(error) as caught:
            write_file(target, described, contents)
        assert caught.value.filename == str(target)
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, described, contents, overwrite=True)
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write anywhere")
def test_a_read_only_folder_gives_a_permission_error(tmp_path: Path) -> None:
    described, contents = sample()
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            write_file(tmp_path / "f.amkv", described, contents)
    finally:
        tmp_path.chmod(0o755)
    assert names(tmp_path) == []


def test_an_existing_file_is_kept_unless_asked_otherwise(tmp_path: Path) -> None:
    described, contents = sample()
    path = tmp_path / "f.amkv"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError) as caught:
        write_file(path, described, contents)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"precious"
    write_file(path, described, contents, overwrite=True)
    with AmkvFile.open(path) as file:
        file.verify()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "dangling", described, contents)
    assert names(tmp_path) == ["dangling", "f.amkv"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    described, contents = sample()
    path = tmp_path / "f.amkv"

    def overtaken() -> None:
        with Writer(path, [spec for spec, _ in contents]) as out:
            fill(out, contents)
            path.write_bytes(b"faster")
            out.finish(described)

    with pytest.raises(FileExistsError):
        overtaken()
    assert path.read_bytes() == b"faster"
    assert names(tmp_path) == ["f.amkv"]


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    described, contents = sample()
    write_file(tmp_path / "f.amkv", described, contents)
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        file.verify()

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="rror"):
        write_file(tmp_path / "g.amkv", described, contents)
    assert names(tmp_path) == ["f.amkv"]


@pytest.mark.skipif(sys.platform == "win32", reason="no umask there")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o377])
def test_the_mode_is_that_of_any_new_file(umask: int, tmp_path: Path) -> None:
    described, contents = sample()
    before = os.umask(umask)
    try:
        write_file(tmp_path / "f.amkv", described, contents)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f.amkv").stat().st_mode) == 0o666 & ~umask


def test_the_longest_allowed_name(tmp_path: Path) -> None:
    described, contents = sample()
    for name in ("n" * 250 + ".amkv", "名" * 83 + ".amkv"):
        write_file(tmp_path / name, described, contents)
    assert len(names(tmp_path)) == 2


KILL_AT = {
    "while streaming": "Writer.write = before(Writer.write, 3)",
    "before the sync": "os.fsync = before(os.fsync)",
    "before the name": "os.link, os.replace = before(os.link), before(os.replace)",
    "after the name": "os.link, os.replace = after(os.link), after(os.replace)",
    "before the folder's sync": "os.fsync = before(os.fsync, 2)",
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("existing", [None, b"old"], ids=["new", "old"])
@pytest.mark.parametrize("moment", KILL_AT)
def test_a_killed_writer_leaves_the_old_file_or_the_whole_new_one(
    moment: str, existing: bytes | None, tmp_path: Path
) -> None:
    script = """
        import os, signal, sys
        sys.path[:0] = sys.argv[2:]
        from amkv_format import Writer, write_file
        from format_samples import sample

        def before(call, count=1):
            def wrapped(*arguments, **named):
                nonlocal count
                count -= 1
                if count == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **named)
            return wrapped

        def after(call):
            def wrapped(*arguments, **named):
                call(*arguments, **named)
                os.kill(os.getpid(), signal.SIGKILL)
            return wrapped

        MOMENT
        write_file(sys.argv[1], *sample(), overwrite=os.path.exists(sys.argv[1]))
    """
    path = tmp_path / "f.amkv"
    if existing is not None:
        path.write_bytes(existing)
    run(script.replace("MOMENT", KILL_AT[moment]), path, status=-9)
    if moment in ("after the name", "before the folder's sync"):
        with AmkvFile.open(path) as file:
            file.verify()
    else:
        assert (path.read_bytes() if path.exists() else None) == existing
    # What may stay behind says by its name what it is.
    assert all(n == "f.amkv" or (n[0] == "." and n.endswith(".tmp")) for n in names(tmp_path))


def test_an_error_of_the_folders_sync_counts_only_when_it_means_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def fails_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_folders)
    described, contents = sample()
    number = errno.EINVAL
    write_file(tmp_path / "f.amkv", described, contents)
    number = errno.EIO
    with pytest.raises(OSError, match="rror"):
        write_file(tmp_path / "g.amkv", described, contents)
