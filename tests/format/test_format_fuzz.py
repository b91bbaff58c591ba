"""A slice of `docs/benchmarks/fuzz.py`: damaged files crash nothing, hang nothing, eat no memory,
and are not accepted with other contents than a good file has."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from amkv_format import AmkvFile

SCRIPT = Path(__file__).parents[2] / "docs" / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> Any:
    found = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def run(fuzz: Any, folder: Path, files: int) -> dict[str, Any]:
    return fuzz.fuzz(
        argparse.Namespace(files=files, seed=7, javascript=False, progress=False), folder
    )


def test_five_hundred_damaged_files(fuzz: Any, tmp_path: Path) -> None:
    found = run(fuzz, tmp_path, 500)
    assert len(found["by_kind"]) == 11
    assert len(found["codes"]) > 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_damaged_files(fuzz: Any, tmp_path: Path) -> None:
    run(fuzz, tmp_path, 100_000)


def test_the_run_fails_where_a_reader_accepts_too_much(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AmkvFile, "verify", lambda self, deep=True: None)
    with pytest.raises(fuzz.FoundError, match="changed content"):
        run(fuzz, tmp_path, 1000)
