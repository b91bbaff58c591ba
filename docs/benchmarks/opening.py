"""Opening and reading 1 GB, beside safetensors: `python docs/benchmarks/opening.py -o FILE`.

The file is a prefill as a model with 32 layers of 8 KV heads of 128 makes it: bfloat16, random
bytes. Times are medians with the file in the page cache; the two readers take turns.

open  header and manifest, read and checked; safetensors checks the header alone
read  every key and value as a torch tensor with memory of its own
map   every key and value as a tensor that shows the file, then all bytes looked at once
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import __version__ as safetensors_version
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "format"), str(ROOT / "formats"), str(ROOT)]

from format_samples import layer, manifest  # noqa: E402

from amcli.storage.artifacts import Artifact  # noqa: E402
from amkv_format import AmkvFile, TensorSpec, Writer, layer_tensor  # noqa: E402

LAYERS, HEADS, DIM = 32, 8, 128


def make(path: Path, gigabytes: float) -> None:
    """Writes the file, in chunks."""
    tokens = int(gigabytes * 1e9 / (LAYERS * HEADS * 2 * DIM * 2)) + 1
    layers = [layer("full", HEADS, DIM, DIM)] * LAYERS
    described = manifest("prefill", tokens, layers, [[tokens] * HEADS] * LAYERS)
    specs = [TensorSpec("token_ids", "I32", (tokens,))]
    for i in range(LAYERS):
        for part in ("keys", "values"):
            specs.append(TensorSpec(layer_tensor(i, part), "BF16", (tokens * HEADS, DIM)))
    with Writer(path, specs) as out:
        out.write("token_ids", bytes(4 * tokens))
        chunk = (torch.randint(0, 2**14, (2**20,)).to(torch.int16)).view(torch.uint8).numpy().data
        for spec in specs[1:]:
            for start in range(0, spec.nbytes, len(chunk)):
                out.write(spec.name, chunk[: min(len(chunk), spec.nbytes - start)])
        out.finish(described)


def opened(path: Path) -> None:
    """Header and manifest, checked."""
    with AmkvFile.open(path) as file:
        assert file.manifest["kind"] == "prefill"


def opened_by_safetensors(path: Path) -> None:
    """Header, and the manifest parsed."""
    with safe_open(path, framework="pt") as file:
        json.loads(file.metadata()["amkv"])


def read(path: Path) -> None:
    """All keys and values, as the package reads them."""
    with Artifact.open(path) as artifact:
        for i in range(LAYERS):
            artifact.heads(i)


def read_by_safetensors(path: Path) -> None:
    """The same tensors, each in memory of its own."""
    with safe_open(path, framework="pt") as file:
        for i in range(LAYERS):
            for part in ("keys", "values"):
                file.get_tensor(layer_tensor(i, part)).clone()


def mapped(path: Path) -> None:
    """Tensors that show the file."""
    with AmkvFile.open(path) as file:
        for i in range(LAYERS):
            for part in ("keys", "values"):
                view = file.read(layer_tensor(i, part))
                torch.frombuffer(view, dtype=torch.int64).sum()


def mapped_by_safetensors(path: Path) -> None:
    """The same."""
    with safe_open(path, framework="pt") as file:
        for i in range(LAYERS):
            for part in ("keys", "values"):
                file.get_tensor(layer_tensor(i, part)).view(torch.int64).sum()


PAIRS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "open": (opened, opened_by_safetensors),
    "read": (read, read_by_safetensors),
    "map": (mapped, mapped_by_safetensors),
}


def measure(path: Path, repeats: int) -> list[dict[str, Any]]:
    """A row for each kind of reading."""
    rows = []
    for name, pair in PAIRS.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):
            for function, found in zip(pair, seconds, strict=True):
                began = time.perf_counter()
                function(path)
                found.append(time.perf_counter() - began)
        ours, theirs = (statistics.median(found[1:]) for found in seconds)
        row: dict[str, Any] = {
            "what": name,
            "amkv_ms": round(1e3 * ours, 3),
            "safetensors_ms": round(1e3 * theirs, 3),
            "speed": round(theirs / ours, 3),
        }
        rows.append(row)
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="amkv-opening-") as folder:
        path = Path(folder) / "f.amkv"
        make(path, args.gigabytes)
        record = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors_version,
            "cpus": os.cpu_count(),
            "file_bytes": path.stat().st_size,
            "repeats": args.repeats,
            "rows": measure(path, args.repeats),
        }
    text = json.dumps(record, indent=1) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
