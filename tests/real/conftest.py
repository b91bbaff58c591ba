"""Real models, from the folder that `AMKV_REAL_MODELS` names; each is skipped where it is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NAMES = ("smollm2", "qwen0.5b")

EVERYTHING_TAKES = 1800
"""Seconds for one test: these are read and run on small processors, too."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are marked, and have more time than others."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("real")
            item.add_marker(pytest.mark.timeout(EVERYTHING_TAKES))


def found(name: str) -> Path:
    """A folder or file of that name; skips the test where there is none."""
    models = os.environ.get("AMKV_REAL_MODELS")
    if not models:
        pytest.skip("AMKV_REAL_MODELS names no folder")
    path = Path(models, name)
    if not path.exists():
        pytest.skip(f"$AMKV_REAL_MODELS has no {name}")
    return path


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str) -> Path:
    """The model in the form of transformers."""
    return found(name)


@pytest.fixture(scope="module")
def file(name: str) -> Path:
    """The GGUF file that the folder was made from."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    return found(f"{name}.gguf")
