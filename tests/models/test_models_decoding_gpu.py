"""CUDA graphs against steps from Python: the same logits, tokens and caches.

A warning, which says why nothing was captured, is an error here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import families
import pytest
import torch
from rounded import ROUTED, errors, exact, fed, judge
from test_models_decoding import MIXED, SOME, compacted, same

from amcli.errors import AmkvWarning
from amcli.models import attend as attend_module
from amcli.models import decoding
from amcli.models import quick as quick_module
from amcli.models.generate import stream
from amcli.models.graphs import CudaGraph
from amcli.models.loading import load
from amcli.models.replies import replies
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.talk.session import Session

ON_GPU = [*SOME, "qwen3_moe", "llama", "olmo2", "phi3", "starcoder2"]


@cache
def on_gpu(name: str, dtype: str, store: str = "native") -> Context:
    """A compact context of a family's tiny model on the GPU."""
    return compacted(load(str(families.folder(name)), device="cuda", dtype=dtype), 3, store)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("name", "dtype", "store"),
    [
        (name, dtype, store)
        for name in ON_GPU
        for dtype in ("float32", "bfloat16")
        for store in ("native", MIXED)
        if dtype == "bfloat16" or name not in ROUTED
        if store == "native" or name in ("qwen3", "gemma2", "gpt_oss", "lfm2")
    ],
)
def test_graphs_compute_what_python_computes(
    name: str, dtype: str, store: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across buffers that grow, from every kind of store that contexts have by default.

    In float32 both give the same. In bfloat16 they may differ, since kernels stand for parts of the
    model and sum in another order; each is judged against float32 (`rounded`).
    """
    monkeypatch.setattr(decoding, "ROOM", 16)
    decoding._can.clear()
    decoding._said.clear()
    context = on_gpu(name, dtype, store)
    torch.manual_seed(rows)
    tokens = torch.randint(3, families.VOCAB, (rows, 100), device="cuda")
    found, decoder = fed(context, tokens)
    assert decoder.cache.step.graph is not None
    assert decoder.cache.step.left < 100, "the buffers never grew"
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "GRAPHS", {})
        plain, other = fed(context, tokens)
        assert other.cache.step is None
        if dtype == "float32":
            worst = errors(found, plain)
            first = int((worst > 1e-4).float().argmax()) // rows  # two from Python, then replays
            assert worst.max() < 1e-4, f"worst {worst.max():.1e}, off from step {first}"
            same(decoder.cache, other.cache)
        else:
            judge(name, found, plain, exact(name, context, tokens))
    assert attend_module.KERNELS.broken == []
    assert quick_module.KERNELS.broken == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "lfm2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_stores_are_captured_without_kernels_too(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpacking in plain PyTorch copies nothing from the host."""
    context = on_gpu(name, dtype, MIXED)
    decoding._can.clear()
    monkeypatch.setattr(attend_module, "by_kernels", lambda *_: None)
    tokens = torch.randint(3, families.VOCAB, (2, 20), device="cuda")
    found, decoder = fed(context, tokens)
    assert decoder.cache.step.graph is not None
    monkeypatch.setattr(decoding, "GRAPHS", {})
    plain, _ = fed(context, tokens)
    if dtype == "float32":
        assert errors(found, plain).max() < 1e-4
    else:
        judge(name, found, plain, exact(name, context, tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "lfm2"])
def test_replays_do_not_wait_for_the_device(name: str) -> None:
    tokens = torch.randint(3, families.VOCAB, (2, 12), device="cuda")
    _, decoder = fed(on_gpu(name, "bfloat16", MIXED), tokens)
    decoder.tokens = 5
    assert decoder.cache.step.graph is not None
    with CudaGraph.strictly():
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
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "lfm2"])
def test_a_graph_serves_the_next_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context, made, make = on_gpu(name, "float32", MIXED), [], CudaGraph.__init__

    def counted(graph: CudaGraph, *arguments: Any) -> None:
        made.append(graph)
        make(graph, *arguments)

    monkeypatch.setattr(CudaGraph, "__init__", counted)
    prompts = [context.loaded.chat.first_turn(f"Who is {i}?") for i in range(6)]

    def replied() -> list[list[int]]:
        return [x.ids for x in replies(context.loaded, context.cache, prompts, [30] * 6, rows=2)]

    found = replied()
    assert len(made) == 1
    monkeypatch.setattr(decoding, "GRAPHS", {})
    assert found == replied()


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
