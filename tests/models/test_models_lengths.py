"""Long texts: every kind of RoPE, beyond the lengths that models were made for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import tinymodels as tiny
import torch
from families import DOCUMENT, cached_logits, full_logits
from transformers import AutoConfig

from amcli.errors import UsageError
from amcli.models.calling import run
from amcli.models.geometry import ModelGeometry
from amcli.models.lengths import for_context, past_training, trained_length
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.talk.session import Session
from amcli.serving.batching import batch_of
from amcli.storage.artifacts import Artifact

QUESTION = "Who lives in the house by the sea?"
LONG = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 6.0]}

# kind: (parameters, positions that the configuration says). The document is longer than 64.
ROPES: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({"rope_type": "default"}, 64),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 1024),
    "dynamic": ({"rope_type": "dynamic", "factor": 16.0}, 64),
    "yarn": ({"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}, 64),
    "llama3": (
        {"rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": 64,
         "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 1024,
    ),
    "longrope": (
        {"rope_type": "longrope", "original_max_position_embeddings": 64, **LONG}, 1024
    ),
    "partial": ({"rope_type": "default", "partial_rotary_factor": 0.5}, 1024),
}  # fmt: skip
CHANGING = ("dynamic", "longrope")
FAMILY = {"partial": "glm", "longrope": "phi3"}


@cache
def folder(kind: str, original: int | None = None) -> Path:
    parameters, positions = ROPES[kind]
    rope = {"rope_theta": 10000.0, **parameters}
    if original is not None:
        rope["original_max_position_embeddings"] = original
    options = {"max_position_embeddings": positions, "rope_parameters": rope}
    if kind == "longrope":
        options["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    name = FAMILY.get(kind, "llama")
    return families.saved(tiny.config(name, vocab_size=families.VOCAB, **options), kind)


@cache
def model(kind: str, original: int | None = None) -> LoadedModel:
    return load(str(folder(kind, original)), device="cpu", dtype="float32")


def kept(context: Context, path: Path) -> Context:
    """What a session loads of a context that was compacted and kept whole."""
    compact(context, Request(ratio=4, queries="repeat", max_queries=64), errors=False)
    compact(context, Request(method="keep"), errors=False).save(path, overwrite=False)
    with Artifact.open(path) as artifact:
        return restore(artifact, context.loaded)


@pytest.mark.parametrize("kind", list(ROPES))
def test_a_document_beyond_the_original_length(kind: str, tmp_path: Path) -> None:
    """In chunks, from a file, and after longer texts: as in one go and from the model's cache."""
    loaded = model(kind)
    context = prefill(loaded, DOCUMENT, chunk=30)
    assert context.T > 64 + 30
    ids = loaded.chat.first_turn(QUESTION)
    wanted = full_logits(families.eager(folder(kind)), context.ids, ids)
    again = kept(context, tmp_path / "keep.amkv")
    torch.testing.assert_close(cached_logits(again, ids), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["expected-attention", "streaming"])
@pytest.mark.parametrize("kind", list(ROPES))
def test_methods_that_turn_keys(kind: str, method: str) -> None:
    context = prefill(model(kind), DOCUMENT)
    options = Request(ratio=4, method=method, store="native", max_queries=64)
    if kind in CHANGING:
        with pytest.raises(UsageError, match=f"has {kind} RoPE, whose frequencies change"):
            compact(context, options, errors=False)
        return
    found = compact(context, options, errors=False)
    assert found.ratio >= 4
    assert all(heads.keys.unpack().isfinite().all() for heads in found.layers)


def test_a_short_text_ends_where_longrope_changes(tmp_path: Path) -> None:
    """Keys turned by the short frequencies are of no use to queries turned by the long ones."""
    loaded = model("longrope", 400)
    context = prefill(loaded, DOCUMENT, chunk=30)
    assert context.loaded.geometry.max_positions == 400
    ids = loaded.chat.first_turn(QUESTION)
    wanted = full_logits(families.eager(folder("longrope", 400)), context.ids, ids)
    again = kept(context, tmp_path / "keep.amkv")
    torch.testing.assert_close(cached_logits(again, ids), wanted, atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="400 positions"):
        list(Session(again).ask("word " * 300))


@torch.no_grad()
def test_a_text_with_no_room_left_is_turned_for_a_long_one(tmp_path: Path) -> None:
    """As the library does, which reads the text again when an answer crosses the line."""
    T = prefill(model("longrope"), DOCUMENT).T
    loaded = model("longrope", T + 20)
    context = prefill(loaded, DOCUMENT, chunk=30)
    ids = loaded.chat.first_turn(QUESTION)
    assert len(ids) > 20
    whole = torch.tensor([context.ids + ids])
    wanted = families.eager(folder("longrope", T + 20))(input_ids=whole, use_cache=False).logits[0]
    again = kept(context, tmp_path / "keep.amkv")
    torch.testing.assert_close(cached_logits(again, ids), wanted[T:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "length"),
    [
        ("qwen3", {"max_position_embeddings": 40960}, 40960),
        ("qwen3", {"max_position_embeddings": 40960, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
            "original_max_position_embeddings": 32768}}, 131072),
        ("llama", {"max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}, 131072),
        ("llama", {"max_position_embeddings": 16384, "rope_parameters": {
            "rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}}, 16384),
        ("llama", {"max_position_embeddings": 32768, "rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}}, 65536),
        ("gpt_oss", {}, 131072),
        ("gpt2", {}, 1024),
        ("mamba", {}, None),
    ],
)  # fmt: skip
def test_the_length_a_model_was_made_for(name: str, options: dict, length: int | None) -> None:
    config = type(AutoConfig.for_model(name))(**options)
    assert trained_length(config) == length
    if length is not None:
        assert past_training(config, length) is None
        warning = past_training(config, length + 1)
        assert warning is not None
        assert f"{length + 1:,} tokens" in warning
        assert f"made for {length:,}" in warning


def test_positions_of_a_context() -> None:
    def positions(tokens: int, limit: int | None, **rope: Any) -> int | None:
        geometry = ModelGeometry((), (), limit, rope, "A")
        return for_context(geometry, tokens, spare=64).max_positions

    assert positions(900, 1000, rope_type="default") == 1000
    assert positions(940, 1000, rope_type="default") is None  # a warning is all there is
    assert positions(940, 1000) == 1000  # a table of positions ends where it ends
    assert positions(940, None) is None
    long = {"rope_type": "longrope", "original_max_position_embeddings": 500}
    assert positions(400, 1000, **long) == 500
    assert positions(450, 1000, **long) == 1000
    assert positions(600, 1000, **long) == 1000


@torch.no_grad()
def test_longrope_contexts_of_different_lengths_go_into_one_batch() -> None:
    """Long frequencies are the same for every long context; short ones would not fit."""
    loaded = model("longrope")
    contexts = [prefill(loaded, Source("doc.txt", DOCUMENT.text * n)) for n in (1, 2)]
    for context in contexts:
        compact(context, Request(method="keep"), errors=False).apply()
    batch, mask = batch_of([context.cache for context in contexts])
    ids = loaded.chat.first_turn(QUESTION)
    mask = torch.cat([mask, torch.ones(2, len(ids), dtype=torch.long)], dim=1)
    where = (mask.cumsum(1) - 1)[:, -len(ids) :]
    rows = torch.tensor([ids, ids])
    found = run(loaded.model, batch, rows, attention_mask=mask, position_ids=where).logits
    for row, context in zip(found, contexts, strict=True):
        torch.testing.assert_close(row, cached_logits(context, ids), atol=1e-4, rtol=0)

    short = prefill(model("longrope", 400), DOCUMENT)
    compact(short, Request(method="keep"), errors=False).apply()
    long = prefill(model("longrope", 400), Source("doc.txt", DOCUMENT.text * 4))
    compact(long, Request(method="keep"), errors=False).apply()
    with pytest.raises(ValueError, match="RoPE that depends on the length"):
        batch_of([short.cache, long.cache])


def test_a_table_of_positions_is_not_outrun() -> None:
    long = Source("long.txt", DOCUMENT.text * 60)
    with pytest.raises(UsageError, match=r"\d+,\d+ tokens.* 4,096 positions"):
        prefill(families.loaded("gpt2"), long)
