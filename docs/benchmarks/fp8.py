"""8-bit floats beside 8-bit codes: `python docs/benchmarks/fp8.py -o docs/benchmarks/fp8.json`.

The error of attention outputs when the whole cache of a generated register is rounded, on
held-out queries, as in `rounding.py`. `int8` is what `--store int8` keeps. `fp8` has 8-bit floats
(e4m3, three bits of mantissa) in their place: with the scales of int8, one to a block of 32 and so
the same bytes; and with one scale to a channel of a head's keys and to a row of values, which saves
6% of the bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import about

from amcli.entries.blocks import block_size
from amcli.entries.stores import quantizer_of
from amcli.generator.documents import generate
from amcli.models.loading import load
from amcli.pipeline.compaction import heldout
from amcli.pipeline.compaction.choices import rounding_error
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.system.progress import Silent

LARGEST = 448.0
"""The largest e4m3 number."""


def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` as 8-bit floats with one scale along `dim`."""
    scale = (x.abs().amax(dim, keepdim=True) / LARGEST).clamp_min(2.0**-14)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@dataclass(frozen=True)
class Floats:
    """Keys `[H, T, d]` and values as 8-bit floats; the form of a `Quantizer`."""

    blocks: bool

    def in_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """One scale to a block, as int8 has them."""
        b = block_size(x.shape[-1])
        return rounded(x.float().reshape(*x.shape[:-1], -1, b), -1).reshape(x.shape)

    def round_keys(self, keys: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Keys as they would be read back."""
        return self.in_blocks(keys) if self.blocks else rounded(keys.float(), -2)

    def round_values(self, values: torch.Tensor) -> torch.Tensor:
        """Values as they would be read back."""
        return self.in_blocks(values) if self.blocks else rounded(values.float(), -1)


STORES: dict[str, Any] = {
    "int8": quantizer_of("int8"),
    "fp8, scales of int8": Floats(blocks=True),
    "fp8, a scale a channel or row": Floats(blocks=False),
}


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--docs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    loaded = load(args.model, dtype="float32")
    found: dict[str, list[float]] = {name: [] for name in STORES}
    for seed in range(args.docs):
        context = prefill(loaded, Source("register", generate(seed, args.tokens).text))
        held = heldout.queries(context, 0, Silent())
        for name, store in STORES.items():
            found[name] += [float(rounding_error(context, i, held[i], store)) for i in held]
    rows = [
        {"store": name, "mean": round(sum(x) / len(x), 5), "worst layer": round(max(x), 5)}
        for name, x in found.items()
    ]
    record = about(args, loaded)
    record["settings"]["output"] = args.output.name
    args.output.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
