"""`docs/models.md` says what the table of families says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import families

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_what_its_writer_makes_of_the_table() -> None:
    spec = importlib.util.spec_from_file_location("docs_models", DOCS / "models.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|.*\| (\S+) \|$", text, re.MULTILINE)
    errors = dict(rows)
    assert list(errors) == list(families.FAMILIES)
    assert all(float(error) < 1e-4 for error in errors.values())
    assert text == writer.page(errors), "run: python docs/models.py"
