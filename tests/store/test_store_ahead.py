"""Files that the system is asked to read while something else goes on."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from amcli.system import files
from amcli.system.files import read_ahead


def wait() -> None:
    for thread in threading.enumerate():
        if thread.name == files.AHEAD:
            thread.join()


def test_all_of_a_file_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[int] = set()

    def advise(descriptor: int, start: int, size: int, what: int) -> None:
        assert what == os.POSIX_FADV_WILLNEED
        asked.update(range(start, start + size))

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    monkeypatch.setattr(files, "PIECE", 7)
    (tmp_path / "f").write_bytes(bytes(30))
    read_ahead(tmp_path / "f")
    wait()
    assert asked >= set(range(30))


def test_what_cannot_be_read_ahead_is_left_to_who_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    read_ahead(tmp_path / "none")
    read_ahead(tmp_path)
    wait()
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    read_ahead(tmp_path / "none")
    assert failed == []
