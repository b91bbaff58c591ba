"""What damaged and forged files do to the reader: `python docs/benchmarks/fuzz.py -o FILE`.

Every good example, and larger files, are changed in eleven ways (bits, bytes, truncations, header
lengths, edits of header and manifest, splices; `tests/format/format_mutations.py`), then opened and
verified. Stops at the first one that

- ends in anything but acceptance or a FormatError,
- takes more than a second,
- allocates more than twice its size and ALLOWANCE,
- is accepted with other tensors, or another manifest, than a file of the corpus has.

Files older than version 1.3 have no hash of their manifest; those are left out of the last point.
With --javascript the second reader has to take and refuse the same files. `bombs` are headers made
to cost as much as they can within the limits of the format: JSON costs a multiple of its text.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "format"), str(ROOT / "formats")]

from format_mutations import Mutant, corpus, joined, mutated  # noqa: E402
from format_samples import layer, manifest, tensors  # noqa: E402

from amkv_format import VERSION, AmkvFile, FormatError, TensorSpec, write_file  # noqa: E402
from amkv_format.limits import MAX_JSON_SEPARATORS  # noqa: E402

ALLOWANCE = 2**18
"""Bytes that the reader may take beside twice the file. The JSON of a header, as Python objects, is
many times its text, which is most of an example file; and numbers are checked in chunks of 32 KiB.
"""

SLOW = 1.0
BATCH = 2000


class FoundError(Exception):
    """A file that the reader does not stand."""


def files(folder: Path) -> list[bytes]:
    """Good examples as they are, the same in the current version, and larger files."""
    found = corpus()
    path = folder / "made.amkv"
    for data in corpus():
        path.write_bytes(data)
        with AmkvFile.open(path) as file:
            specs = [TensorSpec(t.name, t.dtype, t.shape) for t in file.tensors.values()]
            contents = [(spec, bytes(file.read(spec.name))) for spec in specs]
            described = file.manifest
        write_file(path, described, contents, overwrite=True)
        found.append(path.read_bytes())
    for store in ("native", "int8", "k3v2"):
        layers = [layer("full", 4, 16, 16)] * 8
        stored = [[40 + 20 * i + h for h in range(4)] for i in range(8)]
        described = manifest("compact", 512, layers, stored) | {"store": store}
        made = tensors("compact", 512, layers, stored, store=store)
        write_file(path, described, made, overwrite=True)
        found.append(path.read_bytes())
    return found


def content(path: Path) -> tuple[str, str | None]:
    """The payload's hash, and the manifest where it is guarded, of a file that is accepted."""
    with AmkvFile.open(path) as file:
        file.verify()
        return file.payload_hash(), file.manifest.get("manifest_hash")


def accepted(path: Path) -> bool:
    """Whether the reader opens and verifies a file; codes of refusals are counted."""
    try:
        with AmkvFile.open(path) as file:
            file.verify()
    except FormatError as error:
        _codes[str(error.code)] += 1
        return False
    return True


_codes: Counter[str] = Counter()


def judge(mutant: Mutant, path: Path, known: set[tuple[str, str | None]]) -> dict[str, Any]:
    """Seconds, bytes beyond twice the file, and whether it was accepted."""
    path.write_bytes(mutant.data)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    began = time.perf_counter()
    taken = accepted(path)
    seconds = time.perf_counter() - began
    over = tracemalloc.get_traced_memory()[1] - before - 2 * len(mutant.data)
    if seconds > SLOW:
        raise FoundError(f"{mutant.kind}: {seconds:.1f} s")
    if over > ALLOWANCE:
        raise FoundError(f"{mutant.kind}: {over} bytes beside twice {len(mutant.data)}")
    if taken:
        payload, own = content(path)
        payloads = {payload for payload, _ in known}
        if (payload, own) not in known and (own is not None or payload not in payloads):
            raise FoundError(f"{mutant.kind}: accepted with changed content")
    return {"seconds": seconds, "over": over, "accepted": taken}


def bombs(path: Path) -> list[dict[str, Any]]:
    """Headers of as many values as the limits allow: bytes of the file, peak bytes, seconds."""
    made = []
    for item, each in (("[]", 2), ("{}", 2), ('{"":0}', 3), ('"a"', 1)):
        count = MAX_JSON_SEPARATORS // each - 16
        path.write_bytes(joined('{"x":[' + f"{item}," * count + "1]}", b""))
        began = time.perf_counter()
        if accepted(path):
            raise FoundError(f"a header of {item} was accepted")
        seconds = round(time.perf_counter() - began, 3)
        tracemalloc.start()
        accepted(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = path.stat().st_size
        made.append({"of": item, "file_bytes": size, "peak_bytes": peak, "seconds": seconds})
    return made


def second_reader(paths: Sequence[Path]) -> Iterator[bool]:
    """Whether the JavaScript reader accepts each file."""
    reader = ROOT / "tests" / "format" / "js" / "reader.mjs"
    command = ["node", str(reader), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        yield "code" not in json.loads(line)


def fuzz(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole run; raises FoundError with the file kept as `folder/found.amkv`."""
    base = files(folder)
    known = set()
    path = folder / "found.amkv"
    for data in base:
        path.write_bytes(data)
        known.add(content(path))
    random = Random(args.seed)
    kinds: dict[str, Counter[str]] = {}
    slowest, largest, pending = 0.0, 0, []
    tracemalloc.start()
    try:
        for n in range(args.files):
            mutant = mutated(base, random)
            while mutant.data in base:
                mutant = mutated(base, random)
            found = judge(mutant, path, known)
            slowest = max(slowest, found["seconds"])
            largest = max(largest, found["over"])
            seen = kinds.setdefault(mutant.kind, Counter())
            seen["accepted" if found["accepted"] else "refused"] += 1
            if args.javascript:
                kept = folder / f"{n}.amkv"
                kept.write_bytes(mutant.data)
                pending.append((kept, found["accepted"]))
                if len(pending) == BATCH or n + 1 == args.files:
                    compare(pending)
                    pending = []
            if args.progress and (n + 1) % 10_000 == 0:
                print(f"{n + 1:,} files", file=sys.stderr)
    finally:
        tracemalloc.stop()
    return {
        "files": args.files,
        "corpus": len(base),
        "by_kind": {kind: dict(kinds[kind]) for kind in sorted(kinds)},
        "codes": dict(sorted(_codes.items())),
        "slowest_seconds": round(slowest, 4),
        "most_bytes_beside_twice_the_file": largest,
        "allowance_bytes": ALLOWANCE,
        "compared_with_javascript": bool(args.javascript),
    }


def compare(pending: Sequence[tuple[Path, bool]]) -> None:
    """Raises FoundError where the readers differ; removes the files otherwise."""
    paths = [path for path, _ in pending]
    for (path, ours), theirs in zip(pending, second_reader(paths), strict=True):
        if ours != theirs:
            raise FoundError(f"{path.name}: accepted {ours} here, {theirs} in JavaScript")
        path.unlink()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--javascript", action="store_true", help="compare with the second reader")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="amkv-fuzz-"))
    began = time.perf_counter()
    try:
        found = fuzz(args, folder) | {"bombs": bombs(folder / "found.amkv")}
    except Exception as error:
        raise SystemExit(f"{type(error).__name__}: {error}; the file is in {folder}") from error
    record = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "format": VERSION,
        "seed": args.seed,
        **found,
        "seconds": round(time.perf_counter() - began, 1),
    }
    text = json.dumps(record, indent=1) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text, encoding="utf-8")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
