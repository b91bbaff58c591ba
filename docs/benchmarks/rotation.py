"""What turning keys or values by a Hadamard transform does for 4- and 8-bit entries.

    python docs/benchmarks/rotation.py > docs/benchmarks/rotation.json

For every head: the relative error of the attention output over all keys when only the keys, or
only the values, are rounded. Heads of the model in the box on one document, with the queries of its
reference pass; and random heads (d = 128, unit normal keys and queries), with and without four
channels that are 12 larger throughout in keys and 6 times as large in values.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from amcli.entries.blocks import BlockQuantizer
from amcli.generator.documents import generate
from amcli.matching.scores import attention_stats
from amcli.matching.tiles import Logits
from amcli.models.loading import load
from amcli.pipeline.contexts.context import full_layers, live_keys
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries.passages import repeat_passages
from amcli.pipeline.queries.reference import collect
from amcli.system.progress import Silent

Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Logits]  # Q [n, d], K [T, d], V [T, d]


def pocket_heads() -> Iterator[Head]:
    """The heads of the model in the box."""
    context = prefill(load("pocket", device="cpu"), Source("doc.txt", generate(5, 700).text))
    passages = repeat_passages(context)
    found = collect(context, passages, max_queries=512, seed=0, kinds=("max",), progress=Silent())
    for layer in full_layers(context):
        K, V = live_keys(context, layer)
        for h in range(K.shape[0]):
            sample = found[layer].sample
            yield sample.Q[h], K[h], V[h], sample.logits


def random_heads(channels: int) -> Iterator[Head]:
    """Six random heads with so many large channels."""
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        K, V, Q = (torch.randn(n, 128, generator=g) for n in (600, 600, 300))
        large = torch.randperm(128, generator=g)[:channels]
        K[:, large] += 12 * torch.randn(channels, generator=g).sign()
        V[:, large] *= 6
        yield Q * 3**0.5, K, V, Logits(128**-0.5)


def error(head: Head, keys: torch.Tensor, values: torch.Tensor) -> float:
    """Relative error of the output with these keys and values."""
    Q, K, V, logits = head
    _, Y = attention_stats(Q[None], K[None], V[None], logits)
    _, out = attention_stats(Q[None], keys[None], values[None], logits)
    return float((out - Y).norm() / Y.norm())


def main() -> None:
    """Prints the mean error over heads for every kind of head, width, part and turn."""
    kinds = {
        "pocket": list(pocket_heads()),
        "random": list(random_heads(0)),
        "random, four large channels": list(random_heads(4)),
    }
    rows = []
    for name, heads in kinds.items():
        for bits in (8, 4):
            for turned in (False, True):
                quantizer = BlockQuantizer("", bits, rotate=turned)

                def read(x: torch.Tensor, quantizer: BlockQuantizer = quantizer) -> torch.Tensor:
                    return quantizer.keys(x, (x.shape[0],)).unpack()

                keys = [error(head, read(head[1]), head[2]) for head in heads]
                values = [error(head, head[1], read(head[2])) for head in heads]
                for part, found in (("keys", keys), ("values", values)):
                    mean = round(sum(found) / len(found), 4)
                    row = {"heads": name, "count": len(found), "bits": bits, "part": part}
                    rows.append({**row, "turned": turned, "error": mean})
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    sys.stdout.write(f'{{"rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
