"""What a compact context costs at run time: `python docs/benchmarks/runtime.py [PART ...]`.

One GPU, a model of Qwen3-4B's shape with random weights in bf16, no file but what it writes to a
temporary folder. A context of 60k tokens at 50 times fewer bytes, with a budget as skewed as real
ones: log-normal over the heads, one head in every fourth layer with 12 times the mean. Parts, by
default all: `kernel` (attention alone, and its bandwidth against a copy's), `codes` (the same for
stores of few bits, with as many entries in each as in `int4`), `question` (rivals for the prefill
of a question), `decode` (steps from Python and from graphs, tokens a second, the bandwidth's limit:
`runtime_decode.py`), `load` (artifact to GPU, first token, memory). `--json FILE` keeps what other
parts wrote there; `--stores` says which stores `decode` takes (`k4v4+k8v8`: layers by turns, as the
default mixes them).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from runtime_decode import measure_decode
from runtime_setting import (
    CUDA,
    DIM,
    DTYPE,
    HEADS,
    LAYERS,
    LIVE,
    QUERY_HEADS,
    SCALING,
    T,
    copy_rate,
    entries,
    gpu_ms,
    model_and_geometry,
    tokens,
    wall_ms,
)
from torch.nn.functional import scaled_dot_product_attention

from amcli.entries.ragged import Entries
from amcli.models.attend import _explicit, attend
from amcli.models.cache import CompactCache
from amcli.models.generate import absorb, feed
from amcli.models.geometry import ModelGeometry
from amcli.models.seen import Seen
from amcli.serving.batching import BatchedPrefix
from amcli.storage.artifacts import Artifact, write_artifact

# ---- kernel ------------------------------------------------------------------------------------


CODES = ("int4", "k4v4", "k4v2", "k3v3", "k2v2", "k8v8")


def measure_kernel(
    stores: Sequence[str] = ("native", "int8", "int4", "k4v4", "k4v2"),
    as_many_as: str | None = None,
) -> dict[str, Any]:
    """One decode step's attention over all layers: microseconds a layer, and GB/s."""
    ceiling = copy_rate()
    rows = []
    for store in stores:
        for batch, contexts in ((1, 1), (32, 1), (32, 32)):
            prefixes: list[Any] = []
            for layer in range(LAYERS):
                parts = [entries(layer, store, seed, as_many_as) for seed in range(contexts)]
                prefixes.append(BatchedPrefix.join(parts) if contexts > 1 else parts[0])
                del parts
            q = tokens(batch, 1, QUERY_HEADS)
            k, v = tokens(batch, LIVE), tokens(batch, LIVE)
            ms = gpu_ms(lambda q=q, k=k, v=v, p=prefixes: [attend(q, x, k, v) for x in p])
            # Entries and live tokens read once, queries read, outputs written.
            moved = sum(x.nbytes for x in prefixes) + LAYERS * (2 * k.nbytes + 2 * q.nbytes)
            rate = moved / ms / 1e6
            rows.append(
                {
                    "store": store,
                    "batch": batch,
                    "contexts": contexts,
                    "entries_a_layer": sum(sum(x.lengths) for x in prefixes) // LAYERS,
                    "megabytes_a_layer": round(moved / LAYERS / 1e6, 2),
                    "microseconds_a_layer": round(ms / LAYERS * 1e3, 2),
                    "gigabytes_a_second": round(rate),
                    "of_copy": round(rate / ceiling, 3),
                }
            )
    return {"copy_gigabytes_a_second": round(ceiling), "rows": rows}


# ---- question ----------------------------------------------------------------------------------


def measure_question() -> list[dict[str, Any]]:
    """Milliseconds a layer to prefill `m` tokens over a layer's entries, by several ways."""
    rows = []
    for store in ("native", "int4", "k4v4"):
        prefix = entries(1, store)
        for m in (32, 128, 512, 2048):
            q, k, v = tokens(1, m, QUERY_HEADS), tokens(1, m), tokens(1, m)
            ways: dict[str, Callable[[], Any]] = {
                "kernel": partial(attend, q, prefix, k, v),
                "SDPA by head": partial(by_head, q, prefix, k, v),
                "varlen": partial(by_varlen, q, prefix, k, v),
                "plain PyTorch": partial(plain, q, prefix, k, v),
            }
            row: dict[str, Any] = {"store": store, "tokens": m, "entries": sum(prefix.lengths)}
            for name, way in ways.items():
                try:
                    row[name] = round(gpu_ms(way, 10, graph=False), 3)
                except Exception as error:  # a rival that this build of PyTorch lacks
                    row[name] = type(error).__name__
            rows.append(row)
    return rows


def plain(q: torch.Tensor, prefix: Entries, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What a CUDA device without Triton runs."""
    m = q.shape[2]
    grouped = q.reshape(1, HEADS, -1, m, DIM)
    return _explicit(grouped, prefix, k, v, SCALING, None, None, Seen(m, m, None, None))


def by_head(
    q: torch.Tensor, prefix: Entries, k: torch.Tensor, v: torch.Tensor
) -> list[torch.Tensor]:
    """Every KV head by itself: entries and live tokens in one SDPA call with a mask."""
    m = q.shape[2]
    numbers = prefix.unpack().to(CUDA, DTYPE)
    out = []
    for h, (C_k, C_v, _) in enumerate(numbers.heads()):
        rows = q[:, 4 * h : 4 * h + 4]
        keys = torch.cat((C_k, k[0, h])).expand(1, 4, -1, -1)
        values = torch.cat((C_v, v[0, h])).expand(1, 4, -1, -1)
        mask = torch.zeros(m, keys.shape[2], device=CUDA, dtype=DTYPE)
        mask[:, len(C_k) :] = torch.full((m, m), -torch.inf, device=CUDA, dtype=DTYPE).triu(1)
        out.append(scaled_dot_product_attention(rows, keys, values, attn_mask=mask))
    return out


def by_varlen(q: torch.Tensor, prefix: Entries, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """KV heads as the sequences of one varlen flash call, joined with the live tokens' by LSE."""
    m = q.shape[2]
    numbers = prefix.unpack().to(CUDA, DTYPE)
    g = QUERY_HEADS // HEADS
    rows = q.reshape(HEADS * g * m, 1, DIM)
    starts = torch.arange(0, HEADS + 1, device=CUDA, dtype=torch.int32) * g * m
    ends = torch.tensor(numbers.offsets, device=CUDA, dtype=torch.int32)
    keys, values = numbers.keys.unpack()[:, None], numbers.values.unpack()[:, None]
    longest = max(numbers.lengths)
    flash = torch.ops.aten._flash_attention_forward
    past, lse, *_ = flash(rows, keys, values, starts, ends, g * m, longest, 0.0, False, False)
    live = torch.ops.aten._scaled_dot_product_flash_attention
    wide = (x.repeat_interleave(g, 1) for x in (k, v))
    now, live_lse, *_ = live(q, *wide, 0.0, True, False)
    share = torch.sigmoid(live_lse.reshape(-1) - lse.reshape(-1))[:, None]
    before = past.reshape(-1, DIM)
    joined: torch.Tensor = before + share.to(DTYPE) * (now.reshape(-1, DIM) - before)
    return joined


# ---- load --------------------------------------------------------------------------------------


def manifest(store: str, stored: list[list[int]]) -> dict[str, Any]:
    """A valid manifest, from the examples of the specification."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "formats" / "vectors"))
    from building import base_manifest, layer  # type: ignore[import-not-found]

    found: dict[str, Any] = base_manifest(
        "compact", stored, [layer("full", HEADS, DIM, DIM, None)] * LAYERS, T
    )
    found["model"]["dtype"] = "bfloat16"
    if store != "native":
        found |= {"version": "1.1", "store": store, "features_required": [f"store-{store}"]}
    return found


def measure_load(model: Any, geometry: ModelGeometry, folder: Path) -> list[dict[str, Any]]:
    """Artifact to GPU against safetensors and one copy, memory, the question's first token."""
    from safetensors.torch import load_file

    question = [7] * 32
    plain_ms = wall_ms(lambda: feed(model, CompactCache.empty(geometry), question))
    rows = []
    for store in ("native", "int4"):
        path = folder / f"{store}.amkv"
        layers = [entries(i, store) for i in range(LAYERS)]
        write_artifact(path, manifest(store, [list(x.lengths) for x in layers]), [7] * T, layers)
        del layers

        def load(path: Path = path) -> CompactCache:
            cache = CompactCache.empty(geometry)
            with Artifact.open(path) as artifact:
                for i in range(LAYERS):
                    cache.set_prefix(i, artifact.heads(i, CUDA).to(CUDA, DTYPE), T)
            return cache

        def stock(path: Path = path) -> list[torch.Tensor]:
            return [x.to(CUDA) for x in load_file(path).values()]

        load_ms, stock_ms = wall_ms(load), wall_ms(stock)
        gc.collect()
        before = torch.cuda.memory_allocated()
        cache = load()
        held = torch.cuda.memory_allocated() - before
        feed(model, cache.fork(), question)
        first = []
        for _ in range(5):
            cache = load()
            torch.cuda.synchronize()
            start = time.perf_counter()
            feed(model, cache, question)
            torch.cuda.synchronize()
            first.append((time.perf_counter() - start) * 1e3)
        rows.append(
            {
                "store": store,
                "megabytes": round(path.stat().st_size / 1e6, 1),
                "load_ms": round(load_ms, 1),
                "safetensors_and_copy_ms": round(stock_ms, 1),
                "speed_of_safetensors": round(stock_ms / load_ms, 2),
                "memory_over_stored_bytes": round(held / cache.nbytes(), 4),
                "question_after_load_ms": round(statistics.median(first), 1),
                "question_alone_ms": round(plain_ms, 1),
            }
        )
        del cache
    return rows


def measure_prefill_memory(model: Any, geometry: ModelGeometry) -> dict[str, float]:
    """Peak memory of reading the whole document, in GB."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cache = CompactCache.empty(geometry)
    start = time.perf_counter()
    absorb(model, cache, [7] * T)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    rest = peak - before - cache.nbytes()
    found = {"weights": before, "kv": cache.nbytes(), "peak": peak, "beyond_weights_and_kv": rest}
    return {name: round(x / 1e9, 2) for name, x in found.items()} | {"seconds": round(seconds, 1)}


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts", nargs="*", default=["kernel", "codes", "question", "decode", "load"]
    )
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--stores", nargs="*", default=["native", "int4", "k4v4+k8v8"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 32])
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    found |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found |= {"transformers": version("transformers"), "date": date.today().isoformat()}

    def keep(name: str, result: Any) -> None:
        found[name] = result
        args.json.write_text(json.dumps(found, indent=1) + "\n")

    if "kernel" in args.parts:
        keep("kernel", measure_kernel())
    if "codes" in args.parts:
        keep("codes", measure_kernel(CODES, "int4"))
        for row in found["codes"]["rows"]:
            print(*row.values())
    if "question" in args.parts:
        keep("question", measure_question())
    if {"decode", "load"} & set(args.parts):
        model, geometry = model_and_geometry()
        if "load" in args.parts:
            with tempfile.TemporaryDirectory() as folder:
                keep("load", measure_load(model, geometry, Path(folder)))
            keep("prefill_memory", measure_prefill_memory(model, geometry))
        if "decode" in args.parts:
            keep("decode", measure_decode(model, geometry, args.stores, args.batches))


if __name__ == "__main__":
    main()
