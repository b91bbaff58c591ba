"""What the system does to a command: full disks, closed pipes, interrupts, no network."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import amkv_format.writer
from amcli.commands import inspect
from amcli.entries.ragged import Entries
from amcli.kernels.fused import Fused
from amcli.models import attend
from amcli.pipeline.compaction import fitting
from amcli.pipeline.contexts import reading
from conftest import Amkv


def test_no_permission_is_seen_before_the_model_is_loaded(
    amkv: Amkv, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Mocked: root, whom continuous integration likes to be, may write anywhere.
    monkeypatch.setattr("amcli.system.files.os.access", lambda path, mode: False)
    done = amkv("prefill", "doc.txt", "--model", "./no-such-model")
    assert done.code == 1
    assert done.errors[0] == "error: cannot write doc.prefill.amkv: Permission denied"
    assert os.listdir(here) == ["doc.txt"]


def test_kernels_that_cannot_run_are_one_line_and_other_warnings_none(
    amkv: Amkv, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kernels:
        can_attend = staticmethod(lambda *arguments: True)

        @staticmethod
        def attend_prefix(*arguments: object) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    def describe(*arguments: object) -> dict[str, object]:
        warnings.warn("of some library", UserWarning, stacklevel=2)
        assert (
            attend.by_kernels(torch.zeros(1), Entries.of(*[torch.zeros(0, 1)] * 2, None, (0,)))
            is None
        )
        return found(*arguments)

    found = inspect.describe
    monkeypatch.setattr(sys, "warnoptions", [])  # as for users
    monkeypatch.setattr(inspect, "describe", describe)
    broken = Fused("attention", Kernels)  # type: ignore[arg-type]
    monkeypatch.setattr(attend, "KERNELS", broken)
    file = Path(__file__).parents[2] / "formats" / "vectors" / "good" / "compact-f32.amkv"
    done = amkv("inspect", file)
    assert (done.code, done.err.splitlines()) == (
        0,
        [
            "warning: the attention kernels cannot run here, so it takes longer: "
            "RuntimeError: Failed to find C compiler."
        ],
    )
    broken.broken.clear()
    assert amkv("inspect", file, "-q").err == ""


@pytest.mark.parametrize("words", [("prefill", "doc.txt"), ("compact", "doc.txt")])
def test_a_full_disk(
    amkv: Amkv, here: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(amkv_format.writer, "write_at", full)
    done = amkv(*words, "--force", *(["--method", "keep"] if words[0] == "compact" else []))
    assert done.code == 5
    assert "no space left to write" in done.errors[0]
    assert os.listdir(here) == ["doc.txt"]


def test_a_file_that_the_system_stops_halfway(here: Path, environment: dict[str, str]) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [sys.executable, "-m", "amcli", "prefill", "doc.txt"],
        capture_output=True,
        text=True,
        cwd=here,
        env=environment,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 5
    assert "error: no space left to write doc.prefill.amkv" in done.stderr
    assert os.listdir(here) == ["doc.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_standard_output_on_a_full_disk(
    here: Path, compact: Path, environment: dict[str, str]
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "amcli", "inspect", "doc.amkv"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=here,
            env=environment,
            check=False,
        )
    assert done.returncode == 5
    assert done.stderr == "error: no space left to write the output\nhint: free some space\n"


def test_a_hub_model_without_a_network(process: Amkv, here: Path, tmp_path: Path) -> None:
    done = process(
        "prefill",
        "doc.txt",
        "--model",
        "someone/some-model",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "hub"),
    )
    assert done.code == 1
    assert done.errors == [
        "error: the model someone/some-model is not in the local cache, and HF_HUB_OFFLINE is set",
        "hint: unset HF_HUB_OFFLINE, or fetch it first: hf download someone/some-model",
    ]
    assert os.listdir(here) == ["doc.txt"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 5, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 5, "out of"),
        (ZeroDivisionError("a\nb"), 1, "unexpected ZeroDivisionError: a"),
        (KeyError(), 1, "unexpected KeyError"),
    ],
)
def test_what_nobody_expects_is_one_line(
    amkv: Amkv, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, message: str
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(reading, "prefill", fail)
    done = amkv("prefill", "doc.txt")
    assert done.code == code
    assert done.errors[0].startswith(f"error: {message}")
    assert "Traceback" not in done.err
    for words in (("--debug", "prefill", "doc.txt"), ("prefill", "doc.txt", "--debug")):
        debugged = amkv(*words)
        assert debugged.code == code
        assert "Traceback (most recent call last)" in debugged.err
        assert debugged.errors == done.errors


@pytest.mark.parametrize("moment", ["fitting", "writing"])
def test_an_interrupt_leaves_nothing(
    amkv: Amkv, here: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    if moment == "fitting":
        monkeypatch.setattr(fitting, "compact_layers", interrupt)
    else:  # when everything but the name of the file is there
        monkeypatch.setattr(amkv_format.writer, "publish", interrupt)
    done = amkv("compact", "doc.txt")
    assert done.code == 130
    assert done.err.splitlines()[-1] == "interrupted"
    assert done.errors == []
    assert done.out == ""
    assert os.listdir(here) == ["doc.txt"]


def test_ctrl_c_while_compacting(here: Path, environment: dict[str, str]) -> None:
    (here / "doc.txt").write_text((here / "doc.txt").read_text() * 20)
    running = subprocess.Popen(
        [sys.executable, "-m", "amcli", "compact", "doc.txt"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=here,
        env=environment,
    )
    assert running.stderr is not None
    assert running.stderr.readline().startswith("read doc.txt")
    assert running.stderr.readline().startswith("using pocket")  # the model is loaded from here on
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert out == ""
    assert err == "interrupted\n"
    assert os.listdir(here) == ["doc.txt"]


def test_a_reader_that_goes_away_is_no_error(
    here: Path, compact: Path, environment: dict[str, str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for words in (["inspect", "doc.amkv"], ["--version"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "amcli", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            cwd=here,
            env=environment,
            check=False,
        )
        assert done.stderr == ""
    os.close(writing)


def test_colour_is_for_terminals_that_want_it(process: Amkv) -> None:
    assert "\x1b" not in process("compact", "--ratio", "0").err


def test_output_works_where_only_ascii_does(process: Amkv, compact: Path, here: Path) -> None:
    name = "h\u00f6he.amkv"
    compact.rename(here / name)
    done = process("inspect", name, PYTHONIOENCODING="ascii")
    assert done.code == 0
    assert "h?he.amkv" in done.out
