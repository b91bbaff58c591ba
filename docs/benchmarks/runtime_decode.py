"""Decoding in `runtime.py`: steps from Python and from graphs, side by side, against an empty
context and against what the memory's bandwidth allows."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from runtime_setting import CUDA, DIM, DTYPE, HEADS, LAYERS, T, copy_rate, entries, tokens
from transformers.cache_utils import DynamicCache

from amcli.models import attend, calling, decoding, quick
from amcli.models.attention import NAME
from amcli.models.cache import CompactCache
from amcli.models.decoding import Decoder
from amcli.models.generate import stream
from amcli.models.geometry import ModelGeometry
from amcli.serving.batching import BatchedPrefix

PROMPT = 16
STEPS = 16
"""Steps that are timed together, as they follow each other where nobody looks in between."""

ROUNDS = 4
SAID = 200
"""Tokens of the answers that are timed as a reader sees them."""


def compact_cache(geometry: ModelGeometry, store: str, contexts: int = 1) -> CompactCache:
    """A cache that holds the context, or a context of its own for each row; in several stores,
    joined by `+`, the layers take turns."""
    cache, stores = CompactCache.empty(geometry), store.split("+")
    for layer in range(LAYERS):
        one = stores[layer % len(stores)]
        parts = [entries(layer, one, seed) for seed in range(contexts)]
        prefix: Any = BatchedPrefix.join(parts) if contexts > 1 else parts[0]
        cache.set_prefix(layer, prefix, T)
    return cache


def full_cache(model: Any, batch: int) -> DynamicCache:
    """`T` tokens in a cache of transformers."""
    cache = DynamicCache(config=model.config)
    for layer in range(LAYERS):
        cache.update(tokens(batch, T), tokens(batch, T), layer)
    return cache


@contextmanager
def from_python() -> Iterator[None]:
    """No step is captured inside the block."""
    before = dict(decoding.GRAPHS)
    decoding.GRAPHS.clear()
    try:
        yield
    finally:
        decoding.GRAPHS.update(before)


class Decoding:
    """A greedy decode over a cache, after a question; `step` runs one step on the device."""

    def __init__(self, model: Any, cache: Any, batch: int) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.full((batch, PROMPT), 7, device=CUDA)
        self.times: list[float] = []
        self.feed()
        self.live = PROMPT

    @torch.no_grad()
    def feed(self) -> None:
        """Feed what was chosen, and choose the next."""
        out = calling.run(self.model, self.cache, self.ids, logits_to_keep=1)
        self.ids = out.logits[:, -1:].argmax(-1)

    def step(self) -> None:
        """A step."""
        self.feed()
        self.live += 1

    def timed(self) -> None:
        """Note the milliseconds of a step by the clock."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        torch.cuda.synchronize()
        self.times.append((time.perf_counter() - start) * 1e3 / STEPS)

    def profile(self, steps: int = 4) -> tuple[float, int, list[list[Any]]]:
        """Milliseconds a step that kernels run, without the gaps between them; how many they are;
        those that take most, with microseconds a step and launches a step."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                self.step()
            torch.cuda.synchronize()
        found = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
        busy = sum(e.self_device_time_total for e in found)
        top = [
            [e.key[:70], round(e.self_device_time_total / steps, 1), e.count // steps]
            for e in found[:14]
        ]
        return busy / steps / 1e3, sum(e.count for e in found) // steps, top


class Captured(Decoding):
    """The same by graphs."""

    def __init__(self, model: Any, cache: Any, batch: int) -> None:
        super().__init__(model, cache, batch)
        self.decoder = Decoder(model, cache, 10_000)
        for _ in range(4):
            self.step()
        if cache.step is None or cache.step.graph is None:
            raise RuntimeError("nothing was captured")

    def step(self) -> None:
        """A step."""
        self.ids = self.decoder.feed(self.ids).argmax(-1, keepdim=True)
        self.live += 1


def bytes_of(model: Any, cache: CompactCache | None, batch: int, live: int) -> int:
    """Bytes that a step has to read: weights, entries, live tokens."""
    weights = sum(int(p.nbytes) for p in model.parameters())
    prefixes = [layer.prefix for layer in cache.attention] if cache else []
    kept = sum(prefix.nbytes for prefix in prefixes if prefix is not None)
    return weights + kept + batch * live * LAYERS * HEADS * 2 * DIM * DTYPE.itemsize


def measure_decode(
    model: Any, geometry: ModelGeometry, stores: Sequence[str], batches: Sequence[int]
) -> dict[str, Any]:
    """Milliseconds of a step and tokens a second, by context, batch, and where steps come from.

    All take turns, because the speed of a processor that launches kernels drifts.
    """
    ceiling = copy_rate()
    rows: list[dict[str, Any]] = []
    for batch in batches:
        model.set_attn_implementation(NAME)
        makers: dict[str, Any] = {"empty": partial(CompactCache.empty, geometry)}
        for store in stores:
            makers[store] = partial(compact_cache, geometry, store)
            if batch > 1:
                makers[f"{store}, {batch} contexts"] = partial(
                    compact_cache, geometry, store, batch
                )
        runs: dict[tuple[str, str], Decoding] = {}
        for name, make in makers.items():
            cache = make()
            runs[name, "python"] = Decoding(model, cache.fork(batch), batch)
            try:
                runs[name, "graph"] = Captured(model, cache.fork(batch), batch)
            except Exception as error:  # to be seen in the table, not to end it
                rows.append({"batch": batch, "context": name, "error": repr(error)})
                print(rows[-1])
        for _ in range(ROUNDS):
            for run in runs.values():
                run.timed()
        for (name, steps), run in runs.items():
            rows.append(report(model, name, steps, batch, run, ceiling))
            empty = runs.get(("empty", steps))
            if empty is not None:
                share = statistics.median(empty.times) / statistics.median(run.times)
                rows[-1]["of_empty"] = round(share, 3)
            print({key: x for key, x in rows[-1].items() if key != "top"})
        if batch == 1:
            for name, make in makers.items():
                rows.append({"batch": 1, "context": name, **answered(model, make())})
                print(rows[-1])
        del runs, run
        rows.append(measure_full(model, batch, ceiling))
        print({key: x for key, x in rows[-1].items() if key != "top"})
    return {
        "copy_gigabytes_a_second": round(ceiling),
        "kernels_broken": [*attend.KERNELS.broken, *quick.KERNELS.broken],
        "parts_replaced": len(quick._swaps.get(model, [])),
        "rows": rows,
    }


def report(
    model: Any, name: str, steps: str, batch: int, run: Decoding, ceiling: float
) -> dict[str, Any]:
    """A line of the table."""
    wall, (device, launches, top) = statistics.median(run.times), run.profile()
    cache = run.cache if isinstance(run.cache, CompactCache) else None
    moved = bytes_of(model, cache, batch, run.live)
    limit = moved / ceiling / 1e6
    return {
        "batch": batch,
        "context": name,
        "steps": steps,
        "ms": round(wall, 3),
        "device_ms": round(device, 3),
        "tokens_a_second": round(1e3 * batch / wall, 1),
        "megabytes_a_step": round(moved / 1e6, 1),
        "limit_ms": round(limit, 3),
        "of_limit": round(limit / wall, 3),
        "kernels": launches,
        "top": top if steps == "graph" else [],
    }


def answered(model: Any, cache: CompactCache) -> dict[str, Any]:
    """Tokens a second of an answer as it is streamed to a reader, greedy and sampled: with reading
    a question, capturing, and whatever else comes between the first and the last token."""
    loaded: Any = SimpleNamespace(model=model, chat=SimpleNamespace(stop_ids=frozenset()))
    found: dict[str, Any] = {}
    for way, temperature in (("greedy", 0.0), ("sampled", 0.8)):
        for steps in ("python", "graph"):
            few = steps == "python"
            said = stream(
                loaded,
                cache.fork(),
                [7] * PROMPT,
                max_tokens=SAID // 4 if few else SAID,
                temperature=temperature,
            )
            seen = [time.perf_counter()]
            with from_python() if few else nullcontext():
                seen += (time.perf_counter() for _ in said)
            later = statistics.median(b - a for a, b in pairwise(seen[20:]))
            found[f"{way}_{steps}"] = round((len(seen) - 1) / (seen[-1] - seen[0]), 1)
            found[f"{way}_{steps}_later"] = round(1 / later, 1)
    return {"answers_tokens_a_second": found}


def measure_full(model: Any, batch: int, ceiling: float) -> dict[str, Any]:
    """The whole context in the cache and the attention of transformers, where memory suffices."""
    gc.collect()
    torch.cuda.empty_cache()
    model.set_attn_implementation("sdpa")
    try:
        run = Decoding(model, full_cache(model, batch), batch)
        run.timed()
        return report(model, "full", "python, sdpa", batch, run, ceiling)
    except torch.OutOfMemoryError:
        return {"batch": batch, "context": "full", "ms": None}
