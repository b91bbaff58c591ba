"""Makes the example files of format version 1.4: `good/`, `bad/`, and their index `vectors.json`.

    python formats/vectors/make_vectors.py            rewrites them, and the example of `amkv-v1.md`
    python formats/vectors/make_vectors.py --check    fails if a byte differs

It builds every byte by hand from the specification and does not import `amkv_format`, so that
the files test that package instead of repeating its mistakes. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from bad_codes import bad_codes, bad_stores
from bad_examples import bad_containers, bad_contents, bad_manifests, bad_tensors, bad_verify
from bad_packed import bad_mixed, bad_packed, bad_scales
from bad_states import bad_numbers, bad_states
from building import canonical
from decoding import entries
from good_examples import good_examples
from good_packed import good_packed

HERE = Path(__file__).resolve().parent


def render() -> dict[str, bytes]:
    """Every file this program makes: relative path -> bytes."""
    files: dict[str, bytes] = {}
    index: dict[str, list[dict[str, Any]]] = {"good": [], "bad": []}
    for name, reason, it in (*good_examples(), *good_packed()):
        data = files[f"good/{name}.amkv"] = it.file()
        index["good"].append(
            {
                "file": f"good/{name}.amkv",
                "reason": reason,
                "sha256": hashlib.sha256(data).hexdigest(),
                "manifest": it.manifest,
                "entries": entries(it),
                "tensors": {
                    key: {"dtype": dtype, "shape": shape, "sha256": hashlib.sha256(raw).hexdigest()}
                    for key, (dtype, shape, raw) in sorted(it.tensors.items())
                },
            }
        )
    stages = (
        (
            "open",
            (
                bad_containers,
                bad_tensors,
                bad_manifests,
                bad_contents,
                bad_stores,
                bad_states,
                bad_packed,
                bad_mixed,
            ),
        ),
        ("verify", (bad_verify, bad_codes, bad_numbers, bad_scales)),
    )
    for stage, makers in stages:
        for make in makers:
            for name, reason, code, bad in make():
                path = f"bad/{name}.amkv"
                if path in files:
                    raise ValueError(f"two examples are named {name}")
                files[path] = bad if isinstance(bad, bytes) else bad.file()
                index["bad"].append(
                    {"file": path, "reason": reason, "code": code, "refused_by": stage}
                )
    text = json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    files["vectors.json"] = text.encode()
    spec = (HERE.parent / "amkv-v1.md").read_text(encoding="utf-8")
    files["../amkv-v1.md"] = with_example(spec, files["good/worked-example.amkv"]).encode()
    return files


def with_example(spec: str, data: bytes) -> str:
    """The specification with its example's header, manifest and bytes as they are in the file."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    manifest = json.loads(header["__metadata__"]["amkv"])
    header["__metadata__"]["amkv"] = "…"
    lines = [_dump(data, start) for start in range(0, len(data), 16)]
    first, last = 3, (end - 32) // 16
    parts = {
        "header": _lines(header),
        "manifest": _lines(manifest),
        "bytes": "\n".join([*lines[:first], "*", *lines[last:], f"{len(data):08x}"]),
    }
    for name, text in parts.items():
        start = spec.index("\n", spec.index("```", spec.index(f"<!-- {name} -->"))) + 1
        spec = spec[:start] + text + "\n" + spec[spec.index("```", start) :]
    return spec


def _lines(value: dict[str, Any]) -> str:
    """An object with one line for each field."""
    fields = [f" {canonical(name)}: {canonical(value[name])}" for name in sorted(value)]
    return "{\n" + ",\n".join(fields) + "\n}"


def _dump(data: bytes, start: int) -> str:
    """Sixteen bytes as `hexdump -C` shows them."""
    row = data[start : start + 16]
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
    return f"{start:08x}  {row[:8].hex(' '):<23}  {row[8:].hex(' '):<23}  |{text}|"


def differences(files: dict[str, bytes]) -> list[str]:
    """Paths whose bytes on disk are not the rendered ones, and files that nobody renders."""
    changed = [
        path
        for path, data in files.items()
        if not (HERE / path).is_file() or (HERE / path).read_bytes() != data
    ]
    present = {p.relative_to(HERE).as_posix() for p in HERE.glob("*/*.amkv")}
    return sorted(changed + list(present - files.keys()))


def main() -> int:
    """Rewrites the files, or compares them when called with --check."""
    files = render()
    changed = differences(files)
    if sys.argv[1:] == ["--check"]:
        sys.stderr.writelines(f"differs: {path}\n" for path in changed)
        return 1 if changed else 0
    for path in changed:
        (HERE / path).parent.mkdir(exist_ok=True)
        if path in files:
            (HERE / path).write_bytes(files[path])
        else:
            (HERE / path).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
