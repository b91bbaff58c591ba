"""Killed, stopped, crowded out: a file is the old one or the new one, whole, and alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from format_samples import fill, names, run, sample

from amkv_format import AmkvFile, Writer, write_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and fork")

KILLER = """
    import os, random, signal, sys, time
    sys.path[:0] = sys.argv[3:]
    from amkv_format import AmkvFile, write_file
    from format_samples import layer, manifest, tensors

    path, kills = sys.argv[1], int(sys.argv[2])
    layers = [layer("full", 4, 64, 64)] * 4
    made = [tensors("compact", 400, layers, [[n] * 4] * 4) for n in (50, 90)]
    described = [manifest("compact", 400, layers, [[n] * 4] * 4) for n in (50, 90)]
    write_file(path, described[0], made[0])
    began = time.perf_counter()
    write_file(path, described[0], made[0], overwrite=True)
    longest = 5 * (time.perf_counter() - began)
    random.seed(7)
    seen = set()
    for _ in range(kills):
        child = os.fork()
        if not child:
            while True:  # the new one and the old one, in turn
                for i in (1, 0):
                    write_file(path, described[i], made[i], overwrite=True)
        time.sleep(random.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with AmkvFile.open(path) as file:
            file.verify(deep=True)
            seen.add(file.layers[0].stored[0])
    assert seen == {50, 90}, seen
"""


def killed(kills: int, folder: Path) -> None:
    run(KILLER, folder / "f.amkv", Path(str(kills)))
    left = [name for name in names(folder) if name != "f.amkv"]
    # What a killed process could not remove says by its name what it is.
    assert all(name.startswith(".f.amkv.") and name.endswith(".tmp") for name in left)


def test_killed_at_fifty_random_moments(tmp_path: Path) -> None:
    killed(50, tmp_path)


@pytest.mark.slow
def test_killed_at_a_thousand_random_moments(tmp_path: Path) -> None:
    killed(1000, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_is_stopped_while_it_writes_leaves_nothing(
    number: signal.Signals, tmp_path: Path
) -> None:
    script = """
        import sys, time
        sys.path[:0] = sys.argv[2:]
        from amcli.commands import app as cli
        from amkv_format import Writer
        from format_samples import fill, sample

        class Command:
            def main(self, *words, **options):
                contents = sample()[1]
                with Writer(sys.argv[1], [spec for spec, _ in contents], overwrite=True) as out:
                    fill(out, contents[:2])
                    print("writing", flush=True)
                    time.sleep(60)

        cli.typer.main.get_command = lambda app: Command()
        sys.exit(cli.main([]))
    """
    (tmp_path / "f.amkv").write_bytes(b"old")
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "f.amkv"), *sys.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert len(names(tmp_path)) == 2
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert names(tmp_path) == ["f.amkv"]
    assert (tmp_path / "f.amkv").read_bytes() == b"old"


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    script = """
        import os, sys
        sys.path[:0] = sys.argv[2:]
        from amkv_format import AmkvFile, write_file
        from format_samples import sample

        path, children = sys.argv[1], []
        for overwrite in (True, False):
            if not overwrite:
                os.unlink(path)
            for n in range(6):
                child = os.fork()
                if not child:
                    described, contents = sample()
                    described["seed"] = n
                    try:
                        for _ in range(10 if overwrite else 1):
                            write_file(path, described, contents, overwrite=overwrite)
                    except FileExistsError:
                        os._exit(17)
                    os._exit(0)
                children.append(child)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            children.clear()
            wanted = [0] * 6 if overwrite else [0] + [17] * 5
            assert sorted(codes) == wanted, codes
            with AmkvFile.open(path) as file:
                file.verify(deep=True)
    """
    run(script, tmp_path / "f.amkv")
    assert names(tmp_path) == ["f.amkv"]


@pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 1)() != 0, reason="for root, who has to become somebody else"
)
def test_what_others_may_not_write_stays_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "readonly"
    folder.mkdir()
    (folder / "old.amkv").write_bytes(b"old")
    inside = os.open(folder, os.O_RDONLY)  # nobody may pass the folders above it
    described, contents = sample()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.fchdir(inside)
            os.setuid(65534)
            for name in ("new.amkv", "old.amkv"):
                try:
                    write_file(name, described, contents, overwrite=True)
                except PermissionError as error:
                    code = 0 if error.filename == name else 2
        finally:
            os._exit(code)
    os.close(inside)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert names(folder) == ["old.amkv"]
    assert (folder / "old.amkv").read_bytes() == b"old"


def test_another_file_system_behind_a_link(tmp_path: Path) -> None:
    """The temporary file is made where the target is: a rename never crosses file systems."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    there = shared / f"amkv-{os.getpid()}"
    there.mkdir()
    (tmp_path / "link").symlink_to(there)
    described, contents = sample()
    try:
        with Writer(tmp_path / "link" / "f.amkv", [spec for spec, _ in contents]) as out:
            assert len(names(there)) == 1
            fill(out, contents)
            out.finish(described)
        write_file(tmp_path / "link" / "f.amkv", described, contents, overwrite=True)
        with AmkvFile.open(there / "f.amkv") as file:
            file.verify()
        assert names(there) == ["f.amkv"]
    finally:
        for path in there.iterdir():
            path.unlink()
        there.rmdir()


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one, of 64 KiB, where this process may mount it; the old file stays."""
    script = """
        import ctypes, errno, os, sys
        sys.path[:0] = sys.argv[2:]
        from amkv_format import write_file
        from format_samples import layer, manifest, tensors

        folder, c = sys.argv[1], ctypes.CDLL(None)
        alone = c.unshare(0x20000) == 0 and c.mount(None, b"/", None, 0x44000, None) == 0
        if not alone or c.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=64k"):
            raise SystemExit(77)
        path, layers = os.path.join(folder, "f.amkv"), [layer("full", 4, 64, 64)]

        def write(n):
            described = manifest("compact", 90, layers, [[n] * 4])
            made = tensors("compact", 90, layers, [[n] * 4])
            write_file(path, described, made, overwrite=True)
            with open(path, "rb") as file:
                return file.read()

        before = write(2)
        try:
            write(90)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
        else:
            raise SystemExit("the disk was not full")
        assert os.listdir(folder) == ["f.amkv"]
        with open(path, "rb") as file:
            assert file.read() == before
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), *sys.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this process may not mount a small disk")
    assert done.returncode == 0, done.stderr
