"""Methods of other packages: found by name, loaded when asked for, no harm when broken."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amcli.commands import completion
from amcli.errors import AmkvWarning, UsageError
from amcli.matching import methods
from amcli.matching.catalogue import METHODS
from conftest import Amkv

GOOD = """
from amcli.matching.methods import Method


def _score(ctx):
    return ctx.V.float().norm(dim=-1)


VALUE_NORM = Method(
    name="value-norm", score=_score, queries=False, selection="top", values="original",
    budget="uniform",
)
"""

Install = Callable[..., None]


def written(folder: Path, package: str, source: str, **names: str) -> None:
    """What pip leaves of a package `package` whose module of that name has `source`."""
    module = package.replace("-", "_")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name.replace('_', '-')} = {module}{place}" for name, place in names.items()]
    (info / "entry_points.txt").write_text("\n".join(["[amkv.methods]", *lines, ""]))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "site"


@pytest.fixture
def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package for this process: `install(name, source, method=":ATTRIBUTE")`."""
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(methods, "REGISTRY", {})
    before = set(sys.modules)

    def run(package: str, source: str, **names: str) -> None:
        written(site, package, source, **names)

    yield run
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(site)):
            del sys.modules[name]


def test_a_method_of_another_package_is_there_by_name_and_imported_when_asked_for(
    install: Install,
) -> None:
    install("value-norms", GOOD, value_norm=":VALUE_NORM")
    assert methods.names() == [*METHODS, "value-norm"]
    assert completion.methods("val") == ["value-norm"]
    assert completion.several_methods("summary")("omp,val") == ["omp,value-norm"]
    with pytest.raises(UsageError) as caught:
        methods.get("value-nrom")
    assert "did you mean 'value-norm'?" in str(caught.value.hint)
    assert caught.value.code == "unknown-method"
    assert "value_norms" not in sys.modules
    assert methods.get("value-norm").score is not None
    assert methods.get("value-norm") is methods.get("value-norm")
    with pytest.raises(ValueError, match="twice"):
        methods.register(methods.get("value-norm"))


@pytest.mark.parametrize(
    ("source", "place", "cause"),
    [
        (
            "import no_such_thing\n",
            ":M",
            "ModuleNotFoundError: No module named 'no_such_thing'",
        ),
        ("def f(:\n", ":M", "SyntaxError: invalid syntax"),
        ("import sys\nsys.exit('no GPU')\n", ":M", "SystemExit: no GPU"),
        ("raise RuntimeError('one\\ntwo')\n", ":M", "RuntimeError: one"),
        ("", ":M", "AttributeError: module 'broken_one' has no attribute 'M'"),
        ("", "", "broken_one is of type module"),
        (GOOD, ":VALUE_NORM", "broken_one:VALUE_NORM is the method 'value-norm'"),
        ("M = 3\n", ":M", "broken_one:M is of type int"),
    ],
)
def test_a_broken_one_names_its_package_and_the_cause_and_breaks_no_other(
    install: Install, source: str, place: str, cause: str
) -> None:
    install("broken-one", source, other=place)
    install("value-norms", GOOD, value_norm=":VALUE_NORM")
    with pytest.raises(UsageError) as caught:
        methods.get("other")
    error = caught.value
    said, _, found = error.message.partition(" cannot be loaded: ")
    assert said == "method 'other' of package broken-one"
    assert found.startswith(cause)
    assert "\n" not in error.message
    assert "uninstall broken-one" in str(error.hint)
    assert (error.code, error.field, error.facts["package"]) == (
        "broken-method", "method", "broken-one",
    )  # fmt: skip
    assert methods.get("value-norm").name == "value-norm"
    assert methods.get("omp").name == "omp"


def test_a_name_that_is_built_in_stays_what_it_is(install: Install) -> None:
    install("impostor", GOOD.replace("value-norm", "knorm"), knorm=":VALUE_NORM")
    with pytest.warns(AmkvWarning, match="knorm of package impostor is left out"):
        found = methods.get("knorm")
    assert found.score is not None
    assert found.score.__module__ == "amcli.matching.baselines.knorm"
    assert "impostor" not in sys.modules
    assert methods.names() == [*METHODS]


def test_a_name_of_two_packages_is_refused(install: Install) -> None:
    install("one", GOOD, value_norm=":VALUE_NORM")
    install("two", GOOD, value_norm=":VALUE_NORM")
    with pytest.raises(UsageError, match="comes from several packages: one and two"):
        methods.get("value-norm")
    assert methods.names().count("value-norm") == 1


def test_a_package_that_is_there_twice_counts_once(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("value-norms", GOOD, value_norm=":VALUE_NORM")
    written(tmp_path / "again", "value-norms", GOOD, value_norm=":VALUE_NORM")
    monkeypatch.syspath_prepend(str(tmp_path / "again"))
    assert methods.get("value-norm").name == "value-norm"


def test_entry_points_that_cannot_be_read_hide_no_others(install: Install, site: Path) -> None:
    install("value-norms", GOOD, value_norm=":VALUE_NORM")
    install("odd", GOOD, other=":VALUE_NORM")
    (site / "odd-1.0.dist-info" / "entry_points.txt").write_bytes(b"[amkv.methods]\n\xff\xfe\n")
    assert methods.names() == [*METHODS, "value-norm"]


def test_the_command_line_takes_it(
    here: Path, full: Path, site: Path, environment: dict[str, str], process: Amkv
) -> None:
    written(site, "value-norms", GOOD, value_norm=":VALUE_NORM")
    written(site, "broken-one", "import no_such_thing\n", other=":M", omp=":M")
    path = os.pathsep.join((environment["PYTHONPATH"], str(site)))
    done = process(
        "compact", full, "--method", "value-norm", "--ratio", "4", "--json", PYTHONPATH=path
    )
    assert (done.code, done.errors) == (0, [])
    assert json.loads(done.out)["method"] == "value-norm"
    done = process("compact", full, "--method", "other", "-f", PYTHONPATH=path)
    assert done.code == 2
    assert done.errors == [
        "error: method 'other' of package broken-one cannot be loaded: ModuleNotFoundError: "
        "No module named 'no_such_thing'",
        "hint: update or uninstall broken-one; other methods work without it",
    ]
    done = process("compact", full, "--plan", PYTHONPATH=path)
    warning = "warning: the method omp of package broken-one is left out: omp is built in"
    assert done.code == 0
    assert done.err.splitlines().count(warning) == 1
    done = process(
        _AMKV_COMPLETE="complete_zsh",
        _TYPER_COMPLETE_ARGS="amkv compact --method v",
        PYTHONPATH=path,
    )
    assert "value-norm" in done.out
