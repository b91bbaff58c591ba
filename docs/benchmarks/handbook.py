"""Recall on the example handbook: `python docs/benchmarks/handbook.py [--json FILE]`.

Asks the 20 questions of `docs/examples/handbook.questions.jsonl` greedily, each right after the
context, and counts answers that match word for word. Everything goes through artifact files.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from amcli.artifacts import Artifact
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.compaction import Options, compact
from amcli.pipeline.contexts import Context, prefill, restore, save_prefill, tools
from amcli.pipeline.session import Session
from amcli.pipeline.source import read_source

ROWS = (("omp", 20), ("omp", 50), ("highest-attention", 50), ("kvzip", 20))

EXAMPLES = Path(__file__).parents[1] / "examples"


def recall(context: Context, questions: list[dict[str, str]]) -> dict[str, str]:
    """`kind -> right/asked`."""
    right, asked = Counter[str](), Counter[str]()
    for item in questions:
        answer = "".join(Session(context, max_tokens=32).ask(item["question"]))
        asked[item["kind"]] += 1
        right[item["kind"]] += answer == item["answer"]
    return {kind: f"{right[kind]}/{asked[kind]}" for kind in asked}


def measure(path: Path, loaded: LoadedModel, questions: list[dict[str, str]]) -> dict[str, Any]:
    """Bytes, load time and recall of one artifact."""
    began = time.perf_counter()
    with Artifact.open(path) as artifact:
        context = restore(artifact, loaded)
        seconds = time.perf_counter() - began
        return {
            "ratio": round(artifact.ratio, 3),
            "stored_bytes": artifact.payload_bytes,
            "load_seconds": round(seconds, 4),
            "right": recall(context, questions),
        }


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = (EXAMPLES / "handbook.questions.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    loaded = load("pocket", device="cpu", dtype="bfloat16")  # as a GPU would hold it
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        context = prefill(loaded, read_source(str(EXAMPLES / "handbook.txt")))
        seconds = {"prefill": round(time.perf_counter() - began, 2)}
        save_prefill(context, Path(folder, "full.amkv"), overwrite=False)
        rows.append({"method": "full context", "seconds": seconds})
        rows[-1] |= measure(Path(folder, "full.amkv"), loaded, questions)
        print(rows[-1], flush=True)
        for method, ratio in ROWS:
            options = Options(ratio=ratio, method=method, queries="repeat", seed=args.seed)
            found = compact(context, options)
            path = Path(folder, f"{method}-{ratio}.amkv")
            found.save(path, overwrite=False)
            seconds = {stage: round(value, 2) for stage, value in found.seconds.items()}
            rows.append({"method": method, "budget": found.budget, "seconds": seconds})
            rows[-1] |= measure(path, loaded, questions)
            print(rows[-1], flush=True)
    result = {
        "what": "recall of the model in the box (pocket) on docs/examples/handbook.txt",
        "command": "python docs/benchmarks/handbook.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "versions": tools(),
        "seed": args.seed,
        "tokens": context.T,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
