"""The catalogues of names: without torch, and the same as what there is when it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from typing import get_args

import pytest
from helptext import COMMANDS, ROOT, help_document
from typer.main import get_command

from amcli.commands import options
from amcli.commands.app import app
from amcli.entries.catalogue import PACKED, STORES
from amcli.errors import UsageError
from amcli.evaluation import catalogue as evaluation
from amcli.evaluation import makers
from amcli.evaluation.suites import base
from amcli.matching import budgets, catalogue, methods
from amcli.models import catalogue as models
from amcli.models.devices import DTYPES
from amcli.models.shapes import SHAPES
from amcli.pipeline.compaction.defaults import AUTO, DEFAULT_RATIO
from amcli.pipeline.compaction.request import Request, check
from amcli.pipeline.queries import catalogue as queries
from amcli.pipeline.queries import passages
from amkv_format import STORES as FORMAT_STORES

LIGHT = (
    "amcli.entries.catalogue",
    "amcli.evaluation.catalogue",
    "amcli.matching.catalogue",
    "amcli.matching.plugins",
    "amcli.models.catalogue",
    "amcli.pipeline.compaction.defaults",
    "amcli.pipeline.queries.catalogue",
)


def test_catalogues_import_nothing_heavy(environment: dict[str, str]) -> None:
    heavy = ("torch", "numpy", "transformers", "typer")
    code = (
        f"import sys, {', '.join(LIGHT)};"
        f"sys.exit(' '.join(m for m in {heavy} if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("name", catalogue.METHODS)
def test_each_method_is_where_the_catalogue_says(name: str) -> None:
    assert methods.get(name).name == name


def test_methods_are_those_of_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those of packages that happen to be installed."""
    monkeypatch.setattr(methods, "REGISTRY", {})
    monkeypatch.setattr("amcli.matching.plugins.plugins", list)
    assert methods.names() == [*catalogue.METHODS]
    assert next(iter(catalogue.METHODS)) == catalogue.DEFAULT == Request().method
    assert {*evaluation.COMPARED} <= {*catalogue.METHODS}


def test_every_method_in_the_room_is_in_the_catalogue() -> None:
    """What a module of the room declares, somebody can ask for."""
    for name in catalogue.METHODS:
        methods.get(name)
    declared = {
        value.name
        for name, module in sys.modules.items()
        if name == "amcli.matching.recipes" or name.startswith("amcli.matching.baselines.")
        for value in vars(module).values()
        if isinstance(value, methods.Method)
    }
    assert declared == {*catalogue.METHODS}


@pytest.mark.parametrize("name", evaluation.SUITES)
def test_each_suite_is_where_the_catalogue_says(name: str) -> None:
    found = base.get(name)
    assert found.name == name
    assert found.file == evaluation.SUITES[name].file


def test_default_suites_and_what_is_no_method() -> None:
    assert {evaluation.DEFAULT_SUITE, evaluation.DEFAULT_ASKED} <= {*evaluation.SUITES}
    assert {*makers.SPECIAL} == {*evaluation.SPECIAL}


def test_budgets_sources_stores_and_formats() -> None:
    kinds = {*get_args(methods.BudgetKind)} - {"all"}  # that of `keep`, which shares nothing out
    assert {*catalogue.BUDGETS} == {*budgets.NAMES} == kinds
    assert [*queries.SOURCES] == [*passages.SOURCES]
    assert passages.sources(queries.DEFAULT) == tuple(queries.DEFAULT.split("+"))
    assert passages.sources(queries.MIXTURE) == tuple(queries.MIXTURE.split("+"))
    own = [methods.get(name) for name in catalogue.OWN]
    assert {method.source for method in own if method.queries} == {queries.DEFAULT}
    assert {*STORES} == {*FORMAT_STORES}
    assert {*DTYPES} == {*models.DTYPES, *models.DTYPES.values()}
    assert [*models.SHAPES] == [*SHAPES]


@pytest.mark.parametrize("store", [AUTO, *STORES])
def test_every_store_can_be_asked_for(store: str) -> None:
    check(Request(store=store))
    with pytest.raises(UsageError, match="unknown store"):
        check(Request(store=f"{store}x"))


def test_help_has_every_name() -> None:
    """In the option that takes it."""
    sections = dict(zip(COMMANDS, help_document().split("\n## ")[1:], strict=True))

    def told(command: str, option: str) -> str:
        text = sections[(command,)].partition("\nOptions:")[2]
        lines = [" ", *text.partition(f"  {option} ")[2].splitlines()]
        own = "\n".join(lines).partition("\n  -")[0]
        return " ".join(own.split()).replace("- ", "-")  # where a line ends at a hyphen

    for command, option, names in (
        ("compact", "--method", catalogue.METHODS),
        ("compact", "--budget", catalogue.BUDGETS),
        ("compact", "--queries", [*queries.SOURCES, queries.MIXTURE]),
        ("compact", "--store", [AUTO, *(x for x in STORES if x not in PACKED), "kKvV"]),
        ("eval", "--method", [*evaluation.SPECIAL, evaluation.ALL, *evaluation.COMPARED]),
        ("eval", "--suite", evaluation.SUITES),
        ("bench", "--shape", models.SHAPES),
        ("compact", "--dtype", models.DTYPES),
    ):
        text = told(command, option)
        for name in names:
            assert name in text, f"{command} {option} does not name {name}"
    for name in models.DEVICES:
        assert name in sections[("compact",)].partition("--device")[2]
    assert f"{DEFAULT_RATIO:g} if left out" in told("compact", "--ratio")


def test_options_that_commands_share_are_declared_once() -> None:
    """In `options`: a command's own module declares what no other command has."""
    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    count = Counter(name for command in commands for param in command.params for name in param.opts)
    for path in sorted((ROOT / "amcli" / "commands").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr not in ("Option", "count"):
                continue
            names = [word.value for word in node.args if isinstance(word, ast.Constant)]
            shared = [name for name in names if count[name] > 1]
            assert not shared, f"{path.name}:{node.lineno} declares {shared[0]} again"


def test_lists_in_words() -> None:
    assert options.either(["a"]) == "a"
    assert options.either(["a", "b"]) == "a or b"
    assert options.either(["a", "b", "c"]) == "a, b or c"
    assert options.explained("a", "") == "a"
    assert options.explained("a", "first") == "a (first)"
