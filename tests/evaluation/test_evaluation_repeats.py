"""One seed, one file: what two runs may differ in, and the date of a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import amcli
import amkv_format
from amcli.commands.app import main

SOURCES = [str(Path(str(module.__file__)).parents[1]) for module in (amcli, amkv_format)]
SMALL = ("eval", "--docs", "1", "--questions", "2", "--tokens", "200", "--model", "pocket")
METHODS = "omp,am-omp,kvzip,summary,shuffled,random"
TIMES = re.compile(rb'"seconds": \{[^{}]*\}|"prefills": [\d.null]+|"date": "\d{4}-\d\d-\d\d"')


def started(folder: Path, hash_seed: int) -> subprocess.Popen[bytes]:
    """`amkv eval` in a process and a folder of its own; sets of strings differ in order."""
    folder.mkdir()
    words = [*SMALL, "--method", METHODS, "--ratio", "5", "--seed", "3", "--json"]
    paths = [*SOURCES, os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "amcli", *words, "-o", "results.json"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONHASHSEED": str(hash_seed),
            # How a sum is split among threads decides its last bits.
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_processes_with_one_seed_give_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    processes = [started(folder, i + 1) for i, folder in enumerate(folders)]
    printed = []
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err.decode()
        printed.append(out)
    written = [(folder / "results.json").read_bytes() for folder in folders]
    for first, second in (printed, written):
        assert TIMES.sub(b"", first) == TIMES.sub(b"", second)
    # What was left out of the comparison is times only: every number is still in it.
    record = json.loads(written[0])
    assert record["complete"]
    assert len(record["cells"]) == 2 + len(METHODS.split(","))
    left = TIMES.sub(b"", written[0])
    assert left.count(b'"outcomes"') == len(record["cells"])
    assert left.count(b'"recall"') == len(record["rows"])


def test_a_run_that_goes_on_keeps_the_date_of_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("results.json")
    before = datetime.now(UTC).date()
    words = (*SMALL, "--ratio", "5", "-o", str(file), "-q")
    assert main([*words, "--method", "knorm"]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    date = datetime.strptime(record["date"], "%Y-%m-%d").date()
    assert before <= date <= datetime.now(UTC).date() <= before + timedelta(days=1)

    record["date"] = "2024-02-29"
    file.write_text(json.dumps(record), encoding="utf-8")
    assert main([*words, "--method", "knorm,random"]) == 0  # the date is no setting: not refused
    grown = json.loads(file.read_text(encoding="utf-8"))
    assert (grown["date"], len(grown["cells"])) == ("2024-02-29", 4)
    capsys.readouterr()
    assert main([*words, "--method", "knorm,random", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["date"] == "2024-02-29"

    assert main([*words, "--method", "knorm", "--force"]) == 0  # a run of its own
    assert json.loads(file.read_text(encoding="utf-8"))["date"] != "2024-02-29"
