"""Files that are written can be read, and a file is there whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from amkv_format import ITEM_BYTES, AmkvFile, FormatError, TensorSpec, Writer, write_file, writer
from format_samples import Tensors, fill, sample, samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(made=samples(), cuts=st.lists(st.integers(1, 40), min_size=1), order=st.randoms())
def test_round_trip_of_any_manifest_and_any_chunks(
    made: tuple[dict[str, Any], Tensors], cuts: list[int], order: Any, tmp_path: Path
) -> None:
    described, contents = made
    path = tmp_path / "f.amkv"
    shuffled = list(contents)
    order.shuffle(shuffled)
    with Writer(path, [spec for spec, _ in contents], overwrite=True) as out:
        for spec, data in shuffled:
            start = 0
            while start < len(data):
                size = cuts[start % len(cuts)]
                out.write(spec.name, data[start : start + size])
                start += size
        complete = out.finish(described)
    with AmkvFile.open(path) as file:
        file.verify()
        assert file.manifest == complete
        assert complete.items() >= described.items()
        assert {name: bytes(file.read(name)) for name in file.tensors} == {
            spec.name: data for spec, data in contents
        }
    assert names(tmp_path) == ["f.amkv"]


def test_what_the_writer_fills_in_and_what_it_leaves(tmp_path: Path) -> None:
    described, contents = sample()
    complete = write_file(tmp_path / "a.amkv", described, contents)
    assert complete["format"] == "amkv"
    assert complete["version"] == "1.0"
    assert complete["features_required"] == []
    assert complete["created"].endswith("Z")
    again = write_file(tmp_path / "b.amkv", complete, contents)
    assert again == complete
    assert (tmp_path / "a.amkv").read_bytes() == (tmp_path / "b.amkv").read_bytes()


def test_a_wrong_ratio_is_refused(tmp_path: Path) -> None:
    described, contents = sample()
    described["ratio"] = 20.0
    with pytest.raises(FormatError, match="ratio-mismatch"):
        write_file(tmp_path / "f.amkv", described, contents)
    assert names(tmp_path) == []


@pytest.mark.parametrize("move_chunk", [7, 2**20])
@pytest.mark.parametrize("room", [0, 200, 100_000])
def test_any_room_for_the_manifest_gives_the_same_contents(
    room: int, move_chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MOVE_CHUNK", move_chunk)
    described, contents = sample()
    with Writer(tmp_path / "f.amkv", [spec for spec, _ in contents], room=room) as out:
        fill(out, contents)
        out.finish(described)
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        file.verify()
        for spec, data in contents:
            assert file.read(spec.name) == data


def test_memory_stays_bounded_while_streaming(tmp_path: Path) -> None:
    script = """
        import resource, sys
        sys.path[:0] = sys.argv[2:]
        from amkv_format import TensorSpec, Writer, AmkvFile
        from format_samples import manifest, layer
        rows = 2**16
        described = manifest("prefill", rows, [layer("full", 1, 256, 256)], [[rows]])
        specs = [TensorSpec("token_ids", "I32", (rows,))]
        specs += [TensorSpec(f"layers.0.{p}", "BF16", (rows, 256)) for p in ("keys", "values")]
        chunk = bytes(2**18)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with Writer(sys.argv[1], specs, room=0) as out:
            for spec in specs:
                for _ in range(spec.nbytes // len(chunk)):
                    out.write(spec.name, chunk)
            out.finish(described)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 24 * 2**10, f"{grown} KiB for a file of 64 MiB"
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("ru_maxrss has other units elsewhere")
    run(script, tmp_path / "f.amkv")
    assert (tmp_path / "f.amkv").stat().st_size > 64 * 2**20


def run(script: str, *arguments: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments), *sys.path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


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
    code = textwrap.dedent(script).replace("MOMENT", KILL_AT[moment])
    command = [sys.executable, "-c", code, str(path), *sys.path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == -9, result.stderr
    if moment in ("after the name", "before the folder's sync"):
        with AmkvFile.open(path) as file:
            file.verify()
    else:
        assert (path.read_bytes() if path.exists() else None) == existing
    # What may stay behind says by its name what it is.
    assert all(n == "f.amkv" or (n[0] == "." and n.endswith(".tmp")) for n in names(tmp_path))


def test_misuse_is_refused(tmp_path: Path) -> None:
    described, contents = sample()
    specs = [spec for spec, _ in contents]
    path = tmp_path / "f.amkv"
    with pytest.raises(ValueError, match="was given 0"), Writer(path, specs) as out:
        out.finish(described)
    with pytest.raises(ValueError, match="takes 32 bytes"), Writer(path, specs) as out:
        out.write("token_ids", bytes(33))
    with pytest.raises(ValueError, match=r"finish\(\) was not called"), Writer(path, specs) as out:
        fill(out, contents)
    with pytest.raises(KeyError), Writer(path, specs) as out:
        out.write("layers.7.keys", b"")
    with pytest.raises(ValueError, match="not open"):
        Writer(path, specs).write("token_ids", bytes(4))
    with pytest.raises(FormatError, match="comes twice"):
        Writer(path, [*specs, specs[0]])
    with pytest.raises(FormatError, match="tensor-name"):
        Writer(path, [TensorSpec("../x", "F32", (1,))])
    with pytest.raises(FormatError, match="tensor-dtype"):
        Writer(path, [TensorSpec("x", "F64", (1,))])
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("x", float("nan"), "json-number"),
        ("x", "half \ud800", "json-string"),
        ("x", 2**64, "json-number"),
        ("source", {"name": "a/b"}, "field-value"),
        ("created", "yesterday", "field-value"),
        ("boundary", "", "field-value"),
    ],
)
def test_manifests_that_no_reader_would_take(
    field: str, value: object, code: str, tmp_path: Path
) -> None:
    described, contents = sample()
    described[field] = value
    with pytest.raises(FormatError) as caught:
        write_file(tmp_path / "f.amkv", described, contents)
    assert caught.value.code == code
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("token_ids", b"\xff" * 32, "token-id"),
        ("layers.0.beta", b"\x00\x00\x80\x7f" * 4, "not-finite"),
        ("layers.0.positions", b"\x08\0\0\0" * 4, "position"),
    ],
)
def test_contents_that_no_loader_would_take(
    name: str, data: bytes, code: str, tmp_path: Path
) -> None:
    described, contents = sample()
    changed = [(spec, data if spec.name == name else old) for spec, old in contents]
    with pytest.raises(FormatError) as caught:
        write_file(tmp_path / "f.amkv", described, changed)
    assert caught.value.code == code
    assert names(tmp_path) == []


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


def test_extension_tensors_are_carried_and_not_interpreted(tmp_path: Path) -> None:
    described, contents = sample()
    # The names and bytes would be refused in a beta or in positions.
    contents += [
        (TensorSpec("ext.beta", "I32", (2,)), b"\xff" * 8),
        (TensorSpec("ext.layers.0.positions", "BF16", (3, 1)), b"\xff" * 6),
    ]
    write_file(tmp_path / "f.amkv", described, contents)
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        file.verify()
        assert file.read("ext.beta") == b"\xff" * 8


def test_tensors_are_aligned_whatever_their_order(tmp_path: Path) -> None:
    described, contents = sample()
    odd = [(TensorSpec(f"ext.{i}", "F16", (1,)), b"\0\0") for i in range(3)]
    write_file(tmp_path / "f.amkv", described, [odd[0], *contents[::-1], *odd[1:]])
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        for info in file.tensors.values():
            assert info.offset % ITEM_BYTES[info.dtype] == 0


def test_systems_that_write_less_than_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reluctant(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:5])

    monkeypatch.setattr(io, "FileIO", Reluctant)
    described, contents = sample()
    write_file(tmp_path / "f.amkv", described, contents)
    monkeypatch.undo()
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        file.verify()
        assert all(file.read(spec.name) == data for spec, data in contents)
