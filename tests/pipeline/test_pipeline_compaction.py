"""Compaction from end to end: real ratios, recall, determinism, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from boxes import model, source

from amcli.errors import AmkvError, ModelMismatchError, OutOfMemoryError, UsageError
from amcli.generator.dialogues import Questioner
from amcli.generator.documents import generate
from amcli.matching import methods
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context, shared
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries.passages import repeat_passages
from amcli.pipeline.talk.session import Session
from amcli.storage.artifacts import Artifact, write_artifact


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(model("pocket"), source(400))


@pytest.fixture(scope="module")
def compacted(context: Context) -> Compaction:
    return compact(context, Request(ratio=10))


def test_the_ratio_is_that_of_the_bytes_on_disk(compacted: Compaction, tmp_path: Path) -> None:
    compacted.save(tmp_path / "doc.amkv", overwrite=False)
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        assert artifact.ratio == pytest.approx(compacted.ratio)
        assert 10 <= artifact.ratio < 10.1
        assert artifact.payload_bytes == compacted.stored_bytes
        assert (tmp_path / "doc.amkv").stat().st_size < artifact.full_bytes / 8
        assert artifact.manifest["source"]["name"] == "doc.txt"
        assert artifact.token_ids() == compacted.context.ids


def test_a_stored_context_answers_like_the_one_in_memory(
    compacted: Compaction, tmp_path: Path
) -> None:
    context = compacted.context
    compacted.save(tmp_path / "doc.amkv", overwrite=False)
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        stored = restore(artifact, context.loaded)
    for i, heads in enumerate(compacted.layers):
        prefix = stored.cache.layers[i].prefix
        assert prefix is not None
        assert prefix.lengths == heads.lengths
        read, made = prefix.unpack().tensors(), heads.unpack().tensors()
        assert list(read) == list(made) == ["keys", "values", "beta"]
        for name, tensor in read.items():
            torch.testing.assert_close(tensor, made[name], rtol=0, atol=0)
    ask = "Who lives here?"
    compacted_there = replace(context, cache=shared(context, compacted.layers))
    answers = [list(Session(c, max_tokens=12).ask(ask)) for c in (stored, compacted_there)]
    assert answers[0] == answers[1]


def test_direct_facts_survive_twenty_times(tmp_path: Path) -> None:
    loaded = model("pocket")
    document = generate(5, 1000)
    context = prefill(loaded, Source("doc.txt", document.text))
    compact(context, Request(ratio=20)).save(tmp_path / "doc.amkv", overwrite=False)
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        stored = restore(artifact, loaded)
    questions = Questioner(document).distinct(Random(0), "direct", 12)
    right = sum(
        "".join(Session(stored, max_tokens=16).ask(q.question)) == q.answer for q in questions
    )
    assert right >= 11


def test_compaction_leaves_the_context_as_it_was(context: Context) -> None:
    length, size = context.cache.get_seq_length(), context.cache.nbytes()
    compact(context, Request(ratio=20, method="highest-attention"))
    assert (context.cache.get_seq_length(), context.cache.nbytes()) == (length, size)


def test_equal_seeds_give_equal_files(context: Context, tmp_path: Path) -> None:
    one, two = tmp_path / "one.amkv", tmp_path / "two.amkv"
    for path in (one, two):
        found = compact(context, Request(ratio=20, seed=3, max_queries=512))
        found.save(path, overwrite=False)
    with Artifact.open(one) as a, Artifact.open(two) as b:
        assert a.manifest["seed"] == 3
        when = {"created": "", "manifest_hash": ""}  # the payload's hash stays
        assert a.manifest | when == b.manifest | when
        for i in range(len(a.manifest["stored"])):
            heads, again = a.heads(i).unpack(), b.heads(i).unpack()
            assert heads.lengths == again.lengths
            assert torch.equal(heads.keys.unpack(), again.keys.unpack())
            assert torch.equal(heads.values.unpack(), again.values.unpack())


@pytest.mark.parametrize("budget", ["adaptive", "uniform"])
def test_tokens_is_the_mean_budget_of_a_head(context: Context, budget: str) -> None:
    named = Request(tokens=24, budget=budget, method="highest-attention", queries="repeat")
    found = compact(context, named)
    lengths = [t for heads in found.layers for t in heads.lengths]
    assert sum(lengths) == 24 * len(lengths)
    assert (len(set(lengths)) == 1) == (budget == "uniform")


def test_sliding_layers_keep_their_tail() -> None:
    context = prefill(model("gemma3_text"), source(60))
    found = compact(context, Request(ratio=8, max_queries=256))
    geometry = context.loaded.geometry.layers
    for layer, heads in zip(geometry, found.layers, strict=True):
        if layer.window is not None:
            assert set(heads.lengths) == {layer.window - 1}
            assert heads.beta is None
    assert found.ratio >= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Request(ratio=0.5), "below 1"),
        (Request(ratio=float("nan")), "below 1"),
        (Request(ratio=1e9), "more than the context has tokens"),
        (Request(tokens=10**9), "more than the context has"),
        (Request(tokens=0), "below 1"),
        (Request(ratio=2, tokens=3), "exclude each other"),
        (Request(method="opm"), "unknown method 'opm'"),
        (Request(budget="fair"), "unknown budget 'fair'"),
        (Request(queries="guess"), "unknown reference queries 'guess'"),
        (Request(method="keep", ratio=20), "keeps every key"),
    ],
)
def test_options_that_make_no_sense(context: Context, options: Request, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compact(context, options)


def test_a_wrong_method_name_is_helped(context: Context) -> None:
    with pytest.raises(UsageError) as caught:
        compact(context, Request(method="opm"))
    assert "did you mean 'omp'" in str(caught.value.hint)
    assert methods.names()[0] == "omp"


def test_another_model_is_refused_with_what_differs(compacted: Compaction, tmp_path: Path) -> None:
    compacted.save(tmp_path / "doc.amkv", overwrite=False)
    with (
        Artifact.open(tmp_path / "doc.amkv") as artifact,
        pytest.raises(ModelMismatchError, match=r"layers: file 9, model 3.*tokenizer"),
    ):
        restore(artifact, model("qwen3"))


def test_long_documents_are_repeated_in_parts() -> None:
    loaded = model("pocket")
    context = prefill(loaded, source(300))
    passages = repeat_passages(context, part=100)
    said = [token for p in passages for token in p.ids[p.first :]]
    assert said == context.ids[context.document_start : context.document_end]
    assert all(len(p.ids) - p.first <= 100 for p in passages)


def test_answers_of_several_turns_and_samples(context: Context) -> None:
    session = Session(context, max_tokens=12)
    first, second = "".join(session.ask("Who lives here?")), "".join(session.ask("And then?"))
    session.reset()
    assert "".join(session.ask("Who lives here?")) == first
    assert second
    hot = [Session(context, max_tokens=12, temperature=1.5, seed=s) for s in (1, 1, 2, 3, 4)]
    answers = ["".join(s.ask("Who lives here?")) for s in hot]
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1
    with pytest.raises(UsageError, match="empty"):
        list(session.ask("  "))


def test_a_conversation_ends_with_the_positions() -> None:
    loaded = model("qwen3")
    session = Session(prefill(loaded, source(200)), max_tokens=5)
    with pytest.raises(UsageError, match="4,096 positions"):
        list(session.ask("word " * 5000))


def test_a_full_disk_is_one_line(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import amkv_format.writer as writer

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_at", full)
    with pytest.raises(OutOfMemoryError, match="no space left"):
        write_artifact(tmp_path / "x.amkv", {}, context.ids, [])
    assert list(tmp_path.iterdir()) == []


def test_existing_files_and_missing_folders(compacted: Compaction, tmp_path: Path) -> None:
    compacted.save(tmp_path / "doc.amkv", overwrite=False)
    before = (tmp_path / "doc.amkv").read_bytes()
    with pytest.raises(UsageError, match="already exists"):
        compacted.save(tmp_path / "doc.amkv", overwrite=False)
    assert (tmp_path / "doc.amkv").read_bytes() == before
    with pytest.raises(AmkvError, match="does not exist"):
        compacted.save(tmp_path / "no" / "doc.amkv", overwrite=False)
    compacted.save(tmp_path / "doc.amkv", overwrite=True)


def test_a_cache_with_nan_is_refused_by_layer() -> None:
    box = model("qwen3")
    context = prefill(box, source(40))
    layer = context.cache.layers[1]
    keys, values = (x.clone() for x in layer.live())
    values[0, 0, 3, 2] = float("nan")
    layer.set_live(keys[0], values[0], context.T)
    with pytest.raises(AmkvError, match=r"layer 1: 1 of [\d,]+ numbers of the values") as error:
        compact(context, Request(ratio=2))
    assert (error.value.code, error.value.field) == ("numbers-not-finite", "dtype")
