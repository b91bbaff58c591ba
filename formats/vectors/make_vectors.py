"""Makes the example files of format version 1.2: `good/`, `bad/`, and their index `vectors.json`.

    python formats/vectors/make_vectors.py            rewrites them
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
from bad_states import bad_numbers, bad_states
from good_examples import good_examples

HERE = Path(__file__).resolve().parent


def render() -> dict[str, bytes]:
    """Every file this program makes: relative path -> bytes."""
    files: dict[str, bytes] = {}
    index: dict[str, list[dict[str, Any]]] = {"good": [], "bad": []}
    for name, reason, it in good_examples():
        data = files[f"good/{name}.amkv"] = it.file()
        index["good"].append(
            {
                "file": f"good/{name}.amkv",
                "reason": reason,
                "sha256": hashlib.sha256(data).hexdigest(),
                "manifest": it.manifest,
                "tensors": {
                    key: {"dtype": dtype, "shape": shape, "sha256": hashlib.sha256(raw).hexdigest()}
                    for key, (dtype, shape, raw) in sorted(it.tensors.items())
                },
            }
        )
    stages = (
        (
            "open",
            (bad_containers, bad_tensors, bad_manifests, bad_contents, bad_stores, bad_states),
        ),
        ("verify", (bad_verify, bad_codes, bad_numbers)),
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
    return files


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
