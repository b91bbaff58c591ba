"""The model's shape, the context and the clocks of `runtime.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from amcli.entries.blocks import Blocks
from amcli.entries.catalogue import PACKED
from amcli.entries.grouped import Grouped, groups
from amcli.entries.ragged import Entries
from amcli.entries.turned import Turned
from amcli.models.attention import NAME, register
from amcli.models.geometry import LayerGeometry, ModelGeometry

LAYERS, QUERY_HEADS, HEADS, DIM = 36, 32, 8, 128
T, RATIO, LIVE = 60_000, 50, 64
FULL_BYTES = 2 * DIM * 2  # a key and a value in bf16
ENTRY_BYTES = {"native": FULL_BYTES, "int8": 272, "int4": 144}
# Codes, scales of values, and the entry's share of its group's zeros and scales.
ENTRY_BYTES |= {name: DIM * (k + v) // 8 + 4 + DIM * 4 // 64 for name, (k, v) in PACKED.items()}
DTYPE, CUDA = torch.bfloat16, "cuda"
SCALING = DIM**-0.5

# ---- a context ---------------------------------------------------------------------------------


def lengths(layer: int, store: str, seed: int = 0) -> tuple[int, ...]:
    """Entries of each head of a layer; with `RATIO` times fewer bytes in that store than `T` tokens
    of the model."""
    mean = T * FULL_BYTES / (RATIO * ENTRY_BYTES[store])
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    shares = torch.randn(HEADS, generator=generator).exp()
    # A retrieval head in every fourth layer; the other heads share what it leaves.
    big, whole = (12.0, 2.2 * HEADS) if layer % 4 == 0 else (0.0, 0.6 * HEADS)
    shares[0] = 0.0
    t = shares / shares.sum() * (whole - big)
    t[0] = big
    return tuple(int(x * mean) for x in t.roll(layer))


def entries(layer: int, store: str, seed: int = 0, as_many_as: str | None = None) -> Entries:
    """Random entries on the GPU, as they are loaded; as many as another store would have."""
    t = lengths(layer, as_many_as or store, seed)
    N = sum(t)
    if store == "native":
        shape = (N, DIM)
        return Entries.of(
            torch.randn(shape, device=CUDA, dtype=DTYPE),
            torch.randn(shape, device=CUDA, dtype=DTYPE),
            None,
            t,
        )
    if store in PACKED:
        keys, values = PACKED[store]
        scale = torch.full((groups(t), DIM), 4 / 2**keys, device=CUDA).half()
        value_scale = torch.full((N, DIM // 64), 2 / 2**values, device=CUDA).half()
        return Entries(
            Grouped(_bytes(N, keys), scale, -2 * torch.ones_like(scale), store, t),
            Turned(_bytes(N, values), value_scale, store),
            None,
            t,
        )
    return Entries(_codes(N, store, True), _codes(N, store, False), None, t)


def _bytes(N: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 256, (N, DIM * bits // 8), device=CUDA, dtype=torch.uint8)


def _codes(N: int, store: str, keys: bool) -> Blocks:
    scale = torch.full((N, DIM // 32), 0.01 if store == "int8" else 0.15, device=CUDA).half()
    if store == "int8":
        codes = torch.randint(-127, 128, (N, DIM), device=CUDA, dtype=torch.int8)
        return Blocks(codes, scale, False)
    low = torch.randint(1, 16, (N, DIM // 2), device=CUDA, dtype=torch.uint8)
    return Blocks(low | torch.randint_like(low, 1, 16) << 4, scale, keys)


def tokens(B: int, n: int, heads: int = HEADS) -> torch.Tensor:
    """`[B, heads, n, d]` random."""
    return torch.randn(B, heads, n, DIM, device=CUDA, dtype=DTYPE)


# ---- the model ---------------------------------------------------------------------------------


def model_and_geometry() -> tuple[Any, ModelGeometry]:
    """Random weights of Qwen3-4B's shape on the GPU."""
    register()
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
        attn_implementation=NAME,
        dtype=DTYPE,
    )
    torch.set_default_dtype(DTYPE)
    with torch.device(CUDA):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    layer = LayerGeometry("full", HEADS, DIM, DIM)
    geometry = ModelGeometry(
        (layer,) * LAYERS, (QUERY_HEADS,) * LAYERS, 131_072, {}, "Qwen3ForCausalLM"
    )
    model.train(False)
    return model.requires_grad_(False), geometry


# ---- time --------------------------------------------------------------------------------------


def gpu_ms(run: Callable[[], Any], repeats: int = 20, graph: bool = True) -> float:
    """Median milliseconds of `run` on the device; in a CUDA graph, so launches do not count."""
    run()
    torch.cuda.synchronize()
    call = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        call = captured.replay
    # The clocks of an idle device need a while to rise.
    start = time.perf_counter()
    while time.perf_counter() - start < 0.3:
        call()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def wall_ms(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median milliseconds by the clock, until the device is done."""
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def copy_rate() -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    a = torch.randn(1 << 29, device=CUDA)
    b = torch.empty_like(a)
    return 2 * a.nbytes / gpu_ms(lambda: b.copy_(a), graph=False) / 1e6
