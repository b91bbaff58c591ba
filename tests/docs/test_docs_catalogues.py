"""Names in the documentation are those of the catalogues, in their order, with their summaries."""

from __future__ import annotations

import ast
import re

import pytest
from shown import ROOT, fences

from amcli.entries.catalogue import PACKED, STORES
from amcli.evaluation.catalogue import ALL, DEFAULT_ASKED, DEFAULT_SUITE, SPECIAL, SUITES
from amcli.matching.catalogue import BUDGETS, METHODS, OWN, RIVALS, Listed
from amcli.pipeline.queries.catalogue import DEFAULT, MIXTURE, SOURCES


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def tables(text: str, option: str) -> list[dict[str, str]]:
    """The tables whose first column is an option: name to the rest of the row."""
    found = []
    for match in re.finditer(rf"^\| `{option}` \|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.M):
        rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", match[1], re.M)
        assert len(rows) == match[1].count("\n")
        found.append(dict(rows))
    return found


def listed(names: dict[str, Listed]) -> list[tuple[str, str]]:
    return [(name, method.summary) for name, method in names.items()]


def test_methods() -> None:
    own, rivals = tables(page("methods.md"), "--method")
    assert [*own.items()] == listed(OWN)
    assert [*rivals.items()] == listed(RIVALS)


PLAIN = {name: brief for name, brief in STORES.items() if name not in PACKED}


@pytest.mark.parametrize(
    ("option", "names"), [("--budget", BUDGETS), ("--queries", SOURCES), ("--store", PLAIN)]
)
def test_budgets_sources_and_stores(option: str, names: dict[str, str]) -> None:
    [table] = tables(page("methods.md"), option)
    assert [*table.items()] == [*names.items()]


def test_sources_in_words() -> None:
    text = page("methods.md")
    assert f"**The default is `{DEFAULT}`**" in text
    assert f"the mixture is `--queries {MIXTURE}`" in text


def test_suites() -> None:
    text = page("eval.md")
    [table] = tables(text, "--suite")
    assert [*table] == [*SUITES]
    for name, suite in SUITES.items():
        if suite.file is not None and " " not in suite.file:
            assert f"`{suite.file}`" in table[name]
    assert f"The suite is `{DEFAULT_SUITE}` where none is named, and `{DEFAULT_ASKED}` with" in text


def test_what_is_no_method() -> None:
    text = page("eval.md")
    section = text.partition("\n## Methods\n")[2].partition("\n## ")[0]
    assert re.findall(r"^- `([^`]+)`:", section, re.M) == [*SPECIAL]
    assert f"`--method {ALL}` takes" in text


def test_the_entry_of_contributing_is_one() -> None:
    [(_, source, _)] = fences("docs/contributing.md", "py")
    [entry] = ast.parse(f"{{{source}}}", mode="eval").body.values  # type: ignore[attr-defined]
    found = Listed(*(ast.literal_eval(argument) for argument in entry.args))
    assert found.place == "baselines.value_norm:VALUE_NORM"
    assert found.summary
    assert "value-norm" not in METHODS
