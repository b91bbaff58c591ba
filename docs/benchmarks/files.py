"""How long a prefill of 1 GB takes to write and to read: `python docs/benchmarks/files.py`.

Written with one thread and with several; read from a disk at once, and after a few seconds of other
work during which the file was read ahead. The file is made in the current folder, and files.json
beside this script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amcli.entries.ragged import Entries
from amcli.evaluation.results import today
from amcli.evaluation.runner import hardware
from amcli.storage import artifacts
from amcli.storage.artifacts import Artifact
from amcli.system.files import read_ahead
from amcli.system.versions import tools

HERE = Path(__file__).parent

sys.path.insert(0, str(HERE.parents[1] / "formats" / "vectors"))

from building import base_manifest, layer  # type: ignore[import-not-found]  # noqa: E402


def measure(repeats: int) -> dict[str, Any]:
    """Seconds to write and to read, with what overlaps and without; medians."""
    tokens, layers, heads, dim, meanwhile = 7000, 36, 8, 128, 3.0
    lengths = (tokens,) * heads
    make = torch.Generator().manual_seed(0)
    rows = torch.randn((2, heads * tokens, dim), generator=make).bfloat16()
    entries = [Entries.of(rows[0].clone(), rows[1].clone(), None, lengths) for _ in range(layers)]
    shape = [layer("full", heads, dim, dim, None)] * layers
    manifest = base_manifest("prefill", [list(lengths)] * layers, shape, tokens)
    manifest["model"]["dtype"] = "bfloat16"
    found: dict[str, list[float]] = {}

    def timed(name: str, job: Callable[[], object]) -> None:
        began = time.perf_counter()
        job()
        found.setdefault(name, []).append(time.perf_counter() - began)

    def evict(path: Path) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(path: Path) -> None:
        with Artifact.open(path) as artifact:
            for i in range(layers):
                artifact.heads(i)

    threads = artifacts._WRITERS
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "f.amkv"
        for _ in range(repeats):
            for workers, name in ((1, "write, one thread"), (threads, "write, several threads")):
                artifacts._WRITERS = workers
                write = partial(artifacts.write_artifact, path, manifest, [7] * tokens, entries)
                timed(name, partial(write, overwrite=True))
        for _ in range(repeats):
            evict(path)
            time.sleep(meanwhile)
            timed("read", lambda: read(path))
            evict(path)
            read_ahead(path)
            time.sleep(meanwhile)
            timed("read, ahead", lambda: read(path))
        size = path.stat().st_size
    medians = {name: statistics.median(times) for name, times in found.items()}
    return {"bytes": size, "threads": threads, "cores": os.cpu_count(), "meanwhile": meanwhile,
            "repeats": repeats, "seconds": medians}  # fmt: skip


def main() -> None:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    record = {
        "date": today(),
        "hardware": hardware(torch.device("cpu")),
        "tools": tools(),
        "seed": 0,
        "found": measure(args.repeats),
    }
    (HERE / "files.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["found"], indent=1))


if __name__ == "__main__":
    main()
