"""What rounding whole caches does to outputs: `python docs/benchmarks/rounding.py MODEL… -o FILE`.

For each model, the largest relative error of a layer's outputs (mean over its heads, on held-out
queries) when every key and value of a generated register is stored in few bits and nothing else
changes: what `--store auto` decides by. `rotation.py` has heads with a few large channels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from record import about

from amcli.entries.stores import Quantizer, quantizer_of
from amcli.generator.documents import generate
from amcli.models.loading import load
from amcli.pipeline.compaction import heldout
from amcli.pipeline.compaction.choices import rounding_error
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.system.progress import Silent


def quantizers() -> dict[str, Quantizer]:
    """Those that round."""
    found = {name: quantizer_of(name) for name in ("k4v4", "k8v8", "int4", "int8")}
    return {name: q for name, q in found.items() if q is not None}


def of_model(args: argparse.Namespace, name: str) -> list[dict[str, object]]:
    """The worst layer of a model, a row a document and a quantizer."""
    loaded = load(name, dtype="float32", device=args.device)
    rows = []
    for seed in range(args.seed, args.seed + args.docs):
        text = generate(seed, args.tokens).text
        context = prefill(loaded, Source("register", text))
        held = heldout.queries(context, 0, Silent())
        for store, quantizer in quantizers().items():
            errors = [float(rounding_error(context, i, held[i], quantizer)) for i in held]
            rows.append(
                {"model": Path(name).name, "seed": seed, "tokens": context.T, "store": store,
                 "worst layer": round(max(errors), 4), "all layers": [round(e, 4) for e in errors]}
            )  # fmt: skip
    return rows


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--docs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for name in args.models for row in of_model(args, name)]
    args.model = args.models[0]
    about_it = about(args, load(args.models[0], device=args.device))
    names = [Path(name).name for name in args.models]
    about_it["settings"] |= {"models": names, "output": args.output.name}
    del about_it["settings"]["model"]
    args.output.write_text(json.dumps({**about_it, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
