"""The specification and the package say the same, and the package stands on its own."""

from __future__ import annotations

import ast
import hashlib
import re
import sys

from format_samples import VECTORS

from amkv_format import VERSION, Code, TensorSpec, canonical_json, limits
from amkv_format.layout import payload_hash

SPEC = (VECTORS.parent / "amkv-v1.md").read_text(encoding="utf-8")
PACKAGE = VECTORS.parent / "amkv_format"


def rows(pattern: str) -> dict[str, str]:
    return dict(re.findall(rf"^\| `({pattern})` \| (.+?) \|", SPEC, flags=re.MULTILINE))


def test_the_table_of_codes() -> None:
    section = SPEC[SPEC.index("## 11.") : SPEC.index("## 12.")]
    table = re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \|$", section, flags=re.MULTILINE)
    assert table == [(str(code), code.meaning) for code in Code]


def test_the_table_of_limits() -> None:
    stated = {name: int(value) for name, value in rows("MAX_[A-Z_]+").items()}
    actual = {name: value for name, value in vars(limits).items() if name.startswith("MAX_")}
    assert stated == actual


def test_the_version() -> None:
    assert SPEC.startswith(f"# The `.amkv` file, version {VERSION}\n")


def test_the_package_imports_only_itself_and_the_standard_library() -> None:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
            for name in found:
                top = name.partition(".")[0]
                assert top == "amkv_format" or top in sys.stdlib_module_names, f"{path}: {name}"


def test_canonical_json_as_specified() -> None:
    value = {"b": [1, -0.0, 0.5, 1e-7, 1e16, 1e15], "a": 'é"\\\n', "B": {"z": None, "y": True}}
    expected = (
        '{"B":{"y":true,"z":null},"a":"é\\"\\\\\\n",'
        '"b":[1,-0.0,0.5,1e-07,1e+16,1000000000000000.0]}'
    )
    assert canonical_json(value) == expected


def test_payload_hash_as_specified() -> None:
    specs = {"b": TensorSpec("b", "BF16", (412, 128)), "a": TensorSpec("a", "I32", (3,))}
    digests = {"a": "0" * 64, "b": "f" * 64}
    text = f"a I32 [3] {'0' * 64}\nb BF16 [412,128] {'f' * 64}\n"
    assert payload_hash(specs, digests) == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
