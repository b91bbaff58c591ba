"""The JSON Schema says of manifests what the specification and the reader say."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from format_samples import VECTORS, sample
from format_strategies import samples
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from amkv_format import AmkvFile, manifest_schema, write_file

INDEX = json.loads((VECTORS / "vectors.json").read_text(encoding="utf-8"))
SPEC = (VECTORS.parent / "amkv-v1.md").read_text(encoding="utf-8")
SCHEMA = manifest_schema()
VALIDATOR = Draft202012Validator(SCHEMA)

# What involves two fields, or a calendar.
BEYOND_A_SCHEMA = {"bad/created-february.amkv", "bad/stored-above-length.amkv"}


def manifest_of(path: str) -> Any:
    """The manifest of a vector, without any check."""
    data = (VECTORS / path).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["amkv"])


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("entry", INDEX["good"], ids=lambda entry: entry["file"])
def test_manifests_of_good_files_fit(entry: dict[str, Any]) -> None:
    VALIDATOR.validate(entry["manifest"])


def test_manifests_with_wrong_fields_do_not_fit() -> None:
    codes = {"field-missing", "field-type", "field-value", "format-unknown", "version-unsupported"}
    codes.add("feature-unsupported")
    wrong = [entry for entry in INDEX["bad"] if entry["code"] in codes]
    fitting = {e["file"] for e in wrong if VALIDATOR.is_valid(manifest_of(e["file"]))}
    assert fitting == BEYOND_A_SCHEMA
    assert len(wrong) > 30


@settings(max_examples=60, deadline=None)
@given(made=samples())
def test_whatever_the_writer_writes_fits(made: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("schema") / "f.amkv"
    VALIDATOR.validate(write_file(path, *made))


@pytest.mark.parametrize("kind", ["prefill", "compact"])
def test_without_a_required_field_neither_takes_it(kind: str, tmp_path: Any) -> None:
    write_file(tmp_path / "f.amkv", *sample(kind))
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        whole = file.manifest
    for name in whole:
        rest = {key: value for key, value in whole.items() if key != name}
        assert not VALIDATOR.is_valid(rest), name


def test_the_table_of_fields_and_the_schema_name_the_same() -> None:
    section = SPEC[SPEC.index("## 4.") : SPEC.index("## 5.")]
    stated: set[str] = set()
    for cell in re.findall(r"^\| (`[^|]+`) \|", section, flags=re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        names = [first] + [x if x[0] != "." else first.rpartition(".")[0] + x for x in others]
        stated |= {re.sub(r"\[\w\]", "", name) for name in names}
    for field, inner in (("method", "name"), ("budget", "name"), ("requested", "ratio"),
                         ("requested", "tokens"), ("queries", "source"), ("queries", "count"),
                         ("tools", "amkv")):  # fmt: skip
        row = re.search(rf"^\| `{field}` .*", section, flags=re.MULTILINE)
        assert row is not None
        assert f"`{inner}`" in row[0]
        stated.add(f"{field}.{inner}")
    compact = SCHEMA["allOf"][1]["then"]["properties"]
    found = set(_paths({"properties": SCHEMA["properties"] | compact})) | {"tools.amkv"}
    groups = {"model", "tokenizer", "source"}  # only their fields have rows
    assert found - groups == stated - groups


def _paths(schema: dict[str, Any], path: str = "") -> list[str]:
    """Every field that a schema describes, arrays left out."""
    found = []
    for name, inner in schema.get("properties", {}).items():
        at = f"{path}.{name}" if path else name
        found += [at, *_paths(inner.get("items", inner), at)]
    return found
