"""CUDA graphs against steps from Python: the same logits, tokens and caches.

A warning, which says why nothing was captured, is an error here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import families
import pytest
import torch
from test_models_decoding import SOME, same

from amcli.errors import AmkvWarning
from amcli.models import attend as attend_module
from amcli.models import decoding
from amcli.models import quick as quick_module
from amcli.models.calling import run
from amcli.models.decoding import Decoder
from amcli.models.generate import stream
from amcli.models.loading import load
from amcli.models.replies import replies
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.talk.session import Session

ROUTED = {"gpt_oss", "qwen3_next", "nemotron_h", "qwen3_moe"}
"""Families with experts, which PyTorch multiplies without waiting in bfloat16 only."""

ON_GPU = [*SOME, "qwen3_moe", "llama", "olmo2", "phi3", "starcoder2"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}


@cache
def on_gpu(name: str, dtype: str) -> Context:
    """A compact context of a family's tiny model on the GPU."""
    loaded = load(str(families.folder(name)), device="cuda", dtype=dtype)
    found = prefill(loaded, families.DOCUMENT)
    method = Request(ratio=3, method="highest-attention", queries="repeat", store="native")
    compact(found, method, errors=False).apply()
    return found


def fed(name: str, dtype: str, rows: int, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The logits after each of `tokens [rows, n]`, fed one by one after a question; the decoder."""
    context = on_gpu(name, dtype)
    loaded, fork = context.loaded, context.cache.fork(rows)
    prompt = torch.tensor([loaded.chat.first_turn("Who?")] * rows, device="cuda")
    with torch.no_grad():
        run(loaded.model, fork, prompt, logits_to_keep=1)
    decoder = Decoder(loaded.model, fork, tokens.shape[1])
    logits = [decoder.feed(column).float().clone() for column in tokens.split(1, dim=1)]
    return torch.stack(logits), decoder


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in ON_GPU
        for dtype in TOLERANCE
        if dtype == "bfloat16" or name not in ROUTED
    ],
)
def test_graphs_compute_what_python_computes(
    name: str, dtype: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across buffers that grow."""
    monkeypatch.setattr(decoding, "ROOM", 16)
    decoding._can.clear()
    decoding._said.clear()
    tokens = torch.randint(3, families.VOCAB, (rows, 100), device="cuda")
    found, decoder = fed(name, dtype, rows, tokens)
    assert decoder.cache.step.graph is not None
    assert decoder.cache.step.left < 100, "the buffers never grew"
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "GRAPHS", {})
        wanted, plain = fed(name, dtype, rows, tokens)
    assert plain.cache.step is None
    errors = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    first = int((errors > TOLERANCE[dtype]).float().argmax())  # two from Python, then replays
    assert errors.max() < TOLERANCE[dtype], f"worst {errors.max():.1e}, off from step {first}"
    if dtype == "float32":
        same(decoder.cache, plain.cache)
    assert attend_module.KERNELS.broken == []
    assert quick_module.KERNELS.broken == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "lfm2"])
def test_replays_do_not_wait_for_the_device(name: str) -> None:
    tokens = torch.randint(3, families.VOCAB, (2, 12), device="cuda")
    _, decoder = fed(name, "bfloat16", 2, tokens)
    decoder.tokens = 5
    assert decoder.cache.step.graph is not None
    with decoding.CudaGraph.strictly():
        for column in tokens[:, :5].split(1, dim=1):
            decoder.feed(column)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral", "lfm2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_and_replies_are_the_same_from_graphs(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = on_gpu(name, "float32")
    loaded = context.loaded
    prompts = [loaded.chat.first_turn(text) for text in ("Who?", families.QUESTION, "Where?")]

    def all_said() -> list[Any]:
        session = Session(context, max_tokens=60, temperature=temperature)
        texts = ["".join(session.ask(text)) for text in ("Who?", "Where?")]
        options: dict[str, Any] = {"temperature": temperature, "seed": 1}
        found = replies(loaded, context.cache, prompts, [60, 20, 50], **options)
        return [*texts, session.ids, *(reply.ids for reply in found)]

    monkeypatch.setattr(decoding, "ROOM", 16)
    found = all_said()
    monkeypatch.setattr(decoding, "GRAPHS", {})
    assert found == all_said()


@pytest.mark.gpu
def test_a_step_that_waits_is_left_to_python_and_the_gpu_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = on_gpu("gpt2", "float32")
    prompt = context.loaded.chat.first_turn("Who?")

    def tokens() -> list[int]:
        cache = context.cache.fork()
        return list(stream(context.loaded, cache, prompt, max_tokens=20, stop_ids=frozenset()))

    with pytest.warns(AmkvWarning, match="cannot be captured"):
        found = tokens()
    assert tokens() == found
    monkeypatch.setattr(decoding, "GRAPHS", {})
    assert tokens() == found
    assert torch.randn(5, device="cuda").isfinite().all()
