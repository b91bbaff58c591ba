"""The scripts under docs/benchmarks take from the package only what is there."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "docs" / "benchmarks"
SCRIPTS = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_scripts_import_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("amcli"):
            continue
        if "kernels" in str(node.module):
            pytest.importorskip("triton")
        module = import_module(str(node.module))
        for name in node.names:
            if not hasattr(module, name.name):
                import_module(f"{node.module}.{name.name}")
