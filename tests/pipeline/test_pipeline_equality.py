"""The promise of the format: a context that keeps everything answers as the document does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from boxes import model, source

from amcli.artifacts import Artifact
from amcli.models.generate import feed
from amcli.pipeline.compaction import Options, compact
from amcli.pipeline.contexts import Context, prefill, restore, save_prefill

QUESTION = "Who lives in the house by the sea?"
MODELS = ["pocket", "llama", "qwen3", "mistral", "gemma3_text", "gpt_oss"]


@torch.no_grad()
def plain_logits(context: Context, ids: list[int]) -> torch.Tensor:
    """Logits after the whole text in one pass, with no cache at all: `[m, V]`."""
    tokens = torch.tensor([context.ids + ids])
    found = context.loaded.model(input_ids=tokens, use_cache=False).logits
    return found[0, len(context.ids) :]


@torch.no_grad()
def cached_logits(context: Context, ids: list[int]) -> torch.Tensor:
    cache = context.cache.fork()
    tokens = torch.tensor([ids])
    return context.loaded.model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_keep_equals_the_document_in_context(name: str, tmp_path: Path) -> None:
    loaded = model(name)
    context = prefill(loaded, source(120), chunk=50)
    ids = loaded.chat.first_turn(QUESTION)
    wanted = plain_logits(context, ids)

    save_prefill(context, tmp_path / "full.amkv", overwrite=False)
    compact(context, Options(method="keep")).save(tmp_path / "keep.amkv", overwrite=False)
    for file, kind in (("full.amkv", "prefill"), ("keep.amkv", "compact")):
        with Artifact.open(tmp_path / file) as artifact:
            assert artifact.kind == kind
            assert artifact.ratio == 1.0
            again = restore(artifact, loaded)
        torch.testing.assert_close(cached_logits(again, ids), wanted, atol=1e-4, rtol=1e-4)
        # One token at a time, as an answer is written.
        cache = again.cache.fork()
        last = [feed(loaded.model, cache, [token]) for token in ids][-1]
        torch.testing.assert_close(last, wanted[-1], atol=1e-4, rtol=1e-4)


def test_transformers_generate_runs_on_a_compact_context() -> None:
    loaded = model("pocket")
    context = prefill(loaded, source(200))
    kept = compact(context, Options(method="keep"))
    ids = torch.tensor([context.ids + loaded.chat.first_turn(QUESTION)])
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = loaded.model.generate(ids, **options)
    kept.apply()
    found = loaded.model.generate(ids, past_key_values=context.cache.fork(), **options)
    assert found.tolist() == wanted.tolist()
