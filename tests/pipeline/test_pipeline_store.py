"""`--store` from a document to an answer: what is on disk, in memory and in the softmax."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from boxes import model, source

from amcli.entries.catalogue import PACKED
from amcli.entries.stores import quantizer_of
from amcli.errors import UsageError
from amcli.generator.dialogues import Questioner
from amcli.generator.documents import generate
from amcli.models.cache import CompactCache
from amcli.models.calling import run
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.plan import Target
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context, full_layers
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.talk.growing import grow, save
from amcli.pipeline.talk.session import Session
from amcli.serving.batching import BatchedPrefix
from amcli.storage.artifacts import Artifact, NewArtifact
from amcli.system.progress import SILENT
from amkv_format import AmkvFile

CODES = {"int8": torch.int8, "int4": torch.uint8, "k4v4": torch.uint8, "k3v2": torch.uint8}


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
    packed = store in PACKED
    assert manifest["features_required"] == ["store-packed" if packed else f"store-{store}"]
    assert manifest["version"] == "1.4"
    assert "stores" not in manifest
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
    more = native.entry_bytes() / packed.entry_bytes()
    assert entries >= most * more * (1 if not packed.group else 0.85) - 1  # groups cost, too
    assert more > {"int8": 3.2, "int4": 6, "k4v4": 7, "k3v2": 11}[compacted.plan.store]


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
        return run(network, cache, ids).logits


@pytest.mark.parametrize("store", CODES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_attention_over_codes_is_attention_over_their_numbers(name: str, store: str) -> None:
    context = prefill(model(name), source(60))
    found = compact(context, Request(ratio=4, store=store, max_queries=128))
    coded, plain = context.cache.fork(), context.cache.fork()
    for i in full_layers(context):
        coded.set_prefix(i, found.layers[i], context.T)
        plain.set_prefix(i, found.layers[i].unpack(), context.T)
    # Queries are transformed, not keys back, or outputs, not values: the same up to float32.
    most = 0.0 if store == "int8" else 2e-5
    torch.testing.assert_close(logits(context, coded), logits(context, plain), atol=most, rtol=0)
    sliding = set(range(len(found.layers))) - set(full_layers(context))
    assert all(found.layers[i].store == "native" for i in sliding)
    assert (name in ("gemma3_text", "gpt_oss")) == bool(sliding)


@pytest.mark.parametrize(("store", "most"), [("int8", 0.01), ("int4", 0.2), ("k4v4", 0.1)])
def test_keep_loses_the_rounding_only(
    context: Context, store: str, most: float, tmp_path: Path
) -> None:
    kept = compact(context, Request(method="keep", store=store))
    kept.save(tmp_path / "doc.amkv", overwrite=False)
    T, quantizer = context.T, quantizer_of(store)
    groups = -(-T // 64) if quantizer.group else 0
    stored = T * quantizer.entry_bytes(64, 64) + groups * quantizer.group_bytes(64)
    assert kept.ratio == pytest.approx(T * 512 / stored)
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


# ---- a store for each layer ------------------------------------------------------------------

MIX = ("k4v4", "native", "k8v2", "int8", "k2v3", "int4")


@pytest.mark.parametrize("method", ["omp", "keep", "streaming"])
def test_each_layer_in_a_store_of_its_own(context: Context, method: str, tmp_path: Path) -> None:
    stores = {i: MIX[i % len(MIX)] for i in full_layers(context)}
    ratio = None if method == "keep" else 6.0
    request = Request(ratio=ratio, method=method, store=stores, max_queries=256)
    with NewArtifact(tmp_path / "early.amkv") as new:
        found = compact(context, request, errors=False, into=new)
        early = found.finish(new)
    manifest = found.save(tmp_path / "doc.amkv", overwrite=False)
    assert early["payload_hash"] == manifest["payload_hash"]
    assert (manifest["store"], manifest["stores"]) == ("mixed", list(stores.values()))
    assert {"store-mixed", "store-packed"} < set(manifest["features_required"])
    assert found.plan.store == found.plan.record()["store"] == "mixed"
    assert [x["store"] for x in found.plan.record()["layers"]] == list(stores.values())
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        loaded = restore(artifact, context.loaded)
        assert artifact.store == "mixed"
        assert artifact.payload_bytes == found.stored_bytes == loaded.cache.nbytes()
        assert artifact.ratio >= (ratio or 1)
    for i, store in stores.items():
        prefix = loaded.cache.layers[i].prefix
        assert prefix.store == store
        for name, tensor in found.layers[i].tensors().items():
            assert torch.equal(prefix.tensors()[name], tensor)
    together = BatchedPrefix.join([found.layers[0], loaded.cache.layers[0].prefix])
    assert together.nbytes == 2 * found.layers[0].nbytes
    answers = logits(context, loaded.cache.fork()), logits(context, holding(context, found).cache)
    assert torch.equal(*answers)


@pytest.mark.parametrize("store", ["k4v4", "int8"])
def test_sliding_layers_may_be_codes_in_the_file(store: str, tmp_path: Path) -> None:
    context = prefill(model("gemma3_text"), source(60))
    full, layers = full_layers(context), len(context.loaded.geometry.layers)
    request = Request(ratio=3, store=dict.fromkeys(range(layers), store), max_queries=128)
    with NewArtifact(tmp_path / "doc.amkv") as new:
        found = compact(context, request, errors=False, into=new)
        manifest = found.finish(new)
    late = found.save(tmp_path / "late.amkv", overwrite=False)
    assert late["payload_hash"] == manifest["payload_hash"]
    assert (manifest["store"], manifest["stores"]) == ("mixed", [store] * layers)
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        loaded = restore(artifact, context.loaded)
    for i in range(layers):
        if i not in full:  # numbers again, for the window to slide on
            keys, values = loaded.cache.live(i)
            read = found.layers[i].unpack()
            assert torch.equal(keys[0].flatten(0, 1), read.keys.unpack())
            assert torch.equal(values[0].flatten(0, 1), read.values.unpack())
            assert loaded.cache.layers[i].prefix is None
    with AmkvFile.open(tmp_path / "doc.amkv") as file:
        file.verify()


def test_what_a_layer_cannot_store_is_said_with_its_name() -> None:
    context = prefill(model("pocket"), source(100))
    layer = full_layers(context)[2]
    keys, values = context.cache.live(layer)
    context.cache.set_live(layer, keys[0] * 1e7, values[0], context.T)
    for method in ("knorm", "keep", "am-highest-attention", "streaming"):
        request = Request(ratio=4 if method != "keep" else None, method=method, store="k4v4")
        with pytest.raises(UsageError, match=f"layer {layer}: NaN, infinity or a key") as caught:
            compact(context, request, errors=False)
        assert caught.value.code == "not-storable"


def test_a_conversation_joins_groups_and_a_file_begins_them_with_each_head(
    context: Context, tmp_path: Path
) -> None:
    stores = {i: ("k4v4", "k3v3")[i % 2] for i in full_layers(context)}
    found = compact(context, Request(ratio=8, store=stores, max_queries=256), errors=False)
    session = Session(holding(context, found), max_tokens=12)
    "".join(session.ask("Who lives here?"))
    grow(session, ratio=2.0, progress=SILENT)
    for i, store in stores.items():
        prefix = session.context.cache.layers[i].prefix
        assert prefix.store == store
        own = found.layers[i]
        for h in range(len(own.lengths)):  # what was there is still the same
            head = next(iter(prefix.of_heads(h, h + 1).heads()))
            before = next(iter(own.of_heads(h, h + 1).heads()))
            assert torch.equal(head[0][: own.lengths[h]], before[0])
            assert torch.equal(head[1][: own.lengths[h]], before[1])
    save(session, tmp_path / "talk.amkv", overwrite=False)
    with AmkvFile.open(tmp_path / "talk.amkv") as file:
        file.verify()
    with Artifact.open(tmp_path / "talk.amkv") as artifact:
        loaded = restore(artifact, context.loaded)
    for i in stores:
        kept, there = loaded.cache.layers[i].prefix, session.context.cache.layers[i].prefix
        assert kept.lengths == there.lengths
        off = kept.keys.unpack() - there.keys.unpack()
        assert float(off.norm() / there.keys.unpack().norm()) < 0.2


def test_a_store_that_makes_no_sense(context: Context) -> None:
    with pytest.raises(UsageError, match="unknown store 'int2'") as caught:
        compact(context, Request(store="int2"))
    assert "native, int8, int4, k8v8" in str(caught.value.hint)
    for stores in ({0: "int2"}, {0: "auto"}):
        with pytest.raises(UsageError, match="unknown store"):
            compact(context, Request(store=stores))
