"""`--store` from a document to an answer: what is on disk, in memory and in the softmax."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from boxes import model, source

from amcli.entries.stores import quantizer_of
from amcli.errors import UsageError
from amcli.generator.dialogues import Questioner
from amcli.generator.documents import generate
from amcli.models.cache import CompactCache
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.plan import Target
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context, full_layers
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.talk.session import Session
from amcli.storage.artifacts import Artifact
from amkv_format import AmkvFile

CODES = {"int8": torch.int8, "int4": torch.uint8}


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(model("pocket"), source(400))


@pytest.fixture(scope="module", params=list(CODES))
def compacted(context: Context, request: pytest.FixtureRequest) -> Compaction:
    options = Request(
        ratio=20, method="omp", queries="repeat", store=request.param, max_queries=512
    )
    return compact(context, options)


def holding(context: Context, compacted: Compaction) -> Context:
    """The context with compacted entries in place of its own."""
    cache = CompactCache.empty(context.loaded.geometry)
    for i, heads in enumerate(compacted.layers):
        cache.set_prefix(i, heads, context.T)
    return replace(context, cache=cache)


def test_the_ratio_is_that_of_the_bytes_on_disk(compacted: Compaction, tmp_path: Path) -> None:
    path, store = tmp_path / "doc.amkv", compacted.plan.store
    manifest = compacted.save(path, overwrite=False)
    assert manifest["store"] == store
    assert manifest["features_required"] == [f"store-{store}"]
    with AmkvFile.open(path) as file:
        file.verify()
        layers = [t for name, t in file.tensors.items() if name != "token_ids"]
        on_disk = sum(t.nbytes for t in layers)
        assert {t.dtype for t in layers} == {"F16", "F32", "I8" if store == "int8" else "U8"}
        full = sum(x.kv_heads * (x.key_dim + x.value_dim) for x in file.layers)
        full *= file.logical_length * compacted.context.loaded.dtype.itemsize
        assert full == file.full_bytes == compacted.full_bytes
        assert on_disk == compacted.stored_bytes
        assert file.ratio == pytest.approx(full / on_disk)
        assert 20 <= file.ratio < 20.1


def test_few_bits_buy_more_entries(context: Context, compacted: Compaction) -> None:
    entries = sum(sum(heads.lengths) for heads in compacted.layers)
    native, packed = (
        Target.of(context).shapes()[0],
        Target.of(context).shapes(compacted.plan.store)[0],
    )
    most = Target.of(context).full_bytes // 20 // native.entry_bytes()
    assert entries >= most * (native.entry_bytes() / packed.entry_bytes()) - 1
    assert native.entry_bytes() / packed.entry_bytes() > (
        3.2 if compacted.plan.store == "int8" else 6
    )


def test_what_is_loaded_is_what_was_fitted(compacted: Compaction, tmp_path: Path) -> None:
    compacted.save(tmp_path / "doc.amkv", overwrite=False)
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        stored = restore(artifact, compacted.context.loaded)
        assert artifact.payload_bytes == compacted.stored_bytes
    for i in full_layers(stored):
        prefix, heads = stored.cache.layers[i].prefix, compacted.layers[i]
        assert prefix.store == heads.store == compacted.plan.store
        assert prefix.keys.codes.dtype == CODES[compacted.plan.store]
        assert prefix.lengths == heads.lengths
        mine, theirs = prefix.unpack(), heads.unpack()
        assert torch.equal(mine.keys.unpack(), theirs.keys.unpack())
        assert torch.equal(mine.values.unpack(), theirs.values.unpack())
        assert torch.equal(prefix.beta, heads.beta)
    assert stored.cache.nbytes() == compacted.stored_bytes  # codes in memory too


def test_a_cache_of_codes_forks_truncates_and_answers_again(
    context: Context, compacted: Compaction
) -> None:
    loaded = holding(context, compacted)
    cache = loaded.cache
    session = Session(loaded, max_tokens=12)
    first = "".join(session.ask("Who lives here?"))
    session.undo()
    assert "".join(session.ask("Who lives here?")) == first
    assert cache.nbytes() == compacted.stored_bytes
    assert cache.fork(3).layers[0].prefix is cache.layers[0].prefix


def logits(context: Context, cache: CompactCache) -> torch.Tensor:
    ids = torch.tensor([context.ids[5:17]])
    network: Any = context.loaded.model
    with torch.no_grad():
        return network(input_ids=ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("store", CODES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_attention_over_codes_is_attention_over_their_numbers(name: str, store: str) -> None:
    context = prefill(model(name), source(60))
    found = compact(context, Request(ratio=4, store=store, max_queries=128))
    coded, plain = context.cache.fork(), context.cache.fork()
    for i in full_layers(context):
        coded.set_prefix(i, found.layers[i], context.T)
        plain.set_prefix(i, found.layers[i].unpack(), context.T)
    # In 4 bits the queries are transformed, not the keys back: the same up to float32.
    most = 0.0 if store == "int8" else 2e-5
    torch.testing.assert_close(logits(context, coded), logits(context, plain), atol=most, rtol=0)
    sliding = set(range(len(found.layers))) - set(full_layers(context))
    assert all(found.layers[i].store == "native" for i in sliding)
    assert (name in ("gemma3_text", "gpt_oss")) == bool(sliding)


@pytest.mark.parametrize(("store", "most"), [("int8", 0.01), ("int4", 0.2)])
def test_keep_loses_the_rounding_only(
    context: Context, store: str, most: float, tmp_path: Path
) -> None:
    kept = compact(context, Request(method="keep", store=store))
    kept.save(tmp_path / "doc.amkv", overwrite=False)
    assert kept.ratio == pytest.approx(512 / quantizer_of(store).entry_bytes(64, 64))
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        loaded = restore(artifact, context.loaded)
    full, few = logits(context, context.cache.fork()), logits(context, loaded.cache.fork())
    kl = torch.nn.functional.kl_div(
        few.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none"
    )
    assert 0 < float(kl.sum(-1).mean()) < most


@pytest.mark.parametrize(
    "method", ["highest-attention", "streaming", "snapkv", "am-highest-attention"]
)
def test_other_methods_store_codes_too(context: Context, method: str, tmp_path: Path) -> None:
    queries = "repeat" if method == "highest-attention" else None
    options = Request(ratio=20, method=method, queries=queries, store="int8", max_queries=256)
    found = compact(context, options)
    found.save(tmp_path / "doc.amkv", overwrite=False)
    with AmkvFile.open(tmp_path / "doc.amkv") as file:
        file.verify()
        assert file.store == "int8"
        assert 20 <= file.ratio < 20.2


def test_bytes_answer_as_numbers_do_and_more_entries_answer_more() -> None:
    loaded, document = model("pocket"), generate(5, 1000)
    context = prefill(loaded, Source("doc.txt", document.text))
    questions = Questioner(document).distinct(Random(0), "direct", 10)

    def answers(options: Request) -> list[str]:
        session = Session(holding(context, compact(context, options)), max_tokens=16)
        told = []
        for question in questions:
            session.reset()
            told.append("".join(session.ask(question.question)))
        return told

    def right(told: list[str]) -> int:
        return sum(a == q.answer for a, q in zip(told, questions, strict=True))

    # As many entries: nothing but the rounding differs.
    numbers, codes = (
        answers(Request(tokens=48, queries="repeat", store=store)) for store in ("native", "int8")
    )
    assert numbers == codes
    assert right(codes) >= 9
    # As many bytes: four times the entries.
    few, many = (
        answers(Request(ratio=100, queries="repeat", store=store)) for store in ("native", "int4")
    )
    assert right(many) >= right(few) + 3


def test_a_store_that_makes_no_sense(context: Context) -> None:
    with pytest.raises(UsageError, match="unknown store 'int2'") as caught:
        compact(context, Request(store="int2"))
    assert "native, int8, int4" in str(caught.value.hint)
