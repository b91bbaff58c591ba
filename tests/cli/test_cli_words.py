"""Errors by their codes: one list in the source, in the documentation and in the words."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from amcli import errors
from amcli.commands import failures, words
from amcli.commands.words import WORDS, spoken
from amcli.errors import AmkvError, OutOfMemoryError, UsageError

ROOT = Path(__file__).parents[2]
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type)} & {
    "AmkvError",
    *(kind.__name__ for kind in AmkvError.__subclasses__()),
}
OTHERS = re.compile(
    r"python -m \S+|pip install --upgrade|torchrun --\S+|qpdf --decrypt|pandoc \S+ -o"
    r"|iconv -f latin1 -t"
)
"""Other programs that hints may name with their options."""

TYPED = re.compile(
    r"(?<![\w-])--[a-z]|(?<!\S)-[a-z]\b|(?<!\S)/(save|reset|help)\b"
    r"|\bamkv (prefill|compact|chat|inspect|list|diff|verify|export|import|demo|eval|bench)\b"
)
"""What is typed on the command line, or in its conversations."""


@dataclass(frozen=True)
class Raised:
    """A place where an error with a code is made."""

    place: str
    code: str
    field: str | None
    kind: str
    facts: frozenset[str]


def sources() -> Iterator[tuple[str, ast.Module]]:
    """All files below the commands; the trainer is a program of its own."""
    for path in sorted((ROOT / "amcli").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(("amcli/commands/", "amcli/trainer/")):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def strings(node: ast.expr | None) -> list[str]:
    """What an expression may be: a string, or one of two."""
    if isinstance(node, ast.IfExp):
        return strings(node.body) + strings(node.orelse)
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """All places where an error of ours is made, with its class."""
    for name, tree in sources():
        for node in ast.walk(tree):
            kind = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if kind in KINDS and isinstance(node, ast.Call):
                yield f"{name}:{node.lineno}", node, kind


def raised() -> list[Raised]:
    found = []
    for place, call, kind in calls():
        given = {word.arg: word.value for word in call.keywords if word.arg is not None}
        facts = frozenset(given) - {"hint", "code", "field", "place"}
        field = next(iter(strings(given.get("field"))), None)
        found += [Raised(place, code, field, kind, facts) for code in strings(given.get("code"))]
    return found


RAISED = raised()


def test_every_error_below_the_commands_has_a_code() -> None:
    named = {error.place for error in RAISED}
    assert [place for place, _, _ in calls() if place not in named] == []
    assert len(named) > 150


@pytest.mark.parametrize("code", sorted({error.code for error in RAISED}))
def test_a_code_is_one_thing(code: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
    assert len({error.kind for error in RAISED if error.code == code}) == 1


def test_the_documentation_lists_all_codes() -> None:
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]*) \| `(\w+)` \| [^|]+ \|$", page, re.M)
    codes = [code for code, *_ in rows]
    assert len(codes) == len(set(codes))
    listed = {(code, kind): set(re.findall(r"`(\w+)`", fields)) for code, fields, kind in rows}
    made: dict[tuple[str, str], set[str]] = {}
    for error in RAISED:
        made.setdefault((error.code, error.kind), set()).update(filter(None, [error.field]))
    assert listed == made


def wants(text: str | Callable[..., str] | None) -> set[str]:
    """The facts that words are filled with."""
    if text is None:
        return set()
    if isinstance(text, str):
        return {re.split(r"[.\[]", name)[0] for _, name, *_ in Formatter().parse(text) if name}
    parameters = inspect.signature(text).parameters.values()
    return {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}


@pytest.mark.parametrize("code", WORDS)
def test_words_can_be_filled(code: str) -> None:
    places = [error for error in RAISED if error.code == code]
    assert places, "no error has this code"
    for error in places:
        for text in WORDS[code]:
            assert wants(text) <= error.facts, error.place


def test_nothing_below_the_commands_speaks_of_the_command_line() -> None:
    found = []
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):  # with its placeholders: `pandoc {name} -o`
                text = ast.unparse(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if hit := TYPED.search(OTHERS.sub("", text)):
                found.append(f"{name}:{node.lineno}: {hit[0]}")
    assert found == []


# ---- what becomes of an error ------------------------------------------------------------------


def test_an_error_without_words_speaks_for_itself() -> None:
    error = UsageError("no such file: x", "check the path", code="file-missing", field="path")
    assert spoken(error) is error


def test_words_replace_what_they_name_and_leave_the_rest() -> None:
    error = UsageError("GGUF file x does not exist", "check the path", code="model-missing", path=1)
    found = spoken(error)
    assert type(found) is UsageError
    assert found.message == error.message
    assert found.hint == "check the path given to --model"
    assert (found.code, found.facts) == ("model-missing", {"path": 1})
    assert vars(spoken(found)) == vars(found)


@pytest.mark.parametrize(
    ("dtype", "device", "hint"),
    [
        ("float32", "cuda", "try --dtype bfloat16, a smaller model, or --device cpu"),
        ("float32", "cpu", "try --dtype bfloat16, a smaller model, or a machine with more memory"),
        ("bfloat16", "2 GPUs", "try a smaller model, or --device cpu"),
        ("bfloat16", "cpu", "try a smaller model, or a machine with more memory"),
    ],
)
def test_what_to_try_goes_by_the_facts(dtype: str, device: str, hint: str) -> None:
    facts: dict[str, Any] = {"dtype": dtype, "device": device, "model": "it"}
    assert spoken(OutOfMemoryError("no", code="model-too-large", **facts)).hint == hint


def test_where_it_was_found_stays_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORDS, "wrong", words.Words("--{name} is wrong"))
    error = UsageError("it is wrong", code="wrong", field="it", name="it").at("line 3")
    assert str(error) == error.message == "line 3: it is wrong"
    found = failures.as_amkv_error(failures.as_amkv_error(error))
    assert (found.message, found.place) == ("line 3: --it is wrong", "line 3")


def test_errors_cross_to_other_processes() -> None:
    error = UsageError("no", "yes", code="wrong", field="it", ratio=3).at("line 3")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is UsageError
    assert vars(again) == vars(error)
    assert str(again) == str(error)
