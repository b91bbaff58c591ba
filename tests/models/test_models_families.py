"""The promise of the format for every family: what is kept answers as the document does."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import refusals
import torch
from families import cached_logits, full_logits

from amcli.errors import UsageError
from amcli.models.calling import GENERATE
from amcli.models.generate import feed
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill, save_prefill
from amcli.pipeline.talk.session import Session
from amcli.storage.artifacts import Artifact

QUESTION = "Who lives in the house by the sea?"
TOLERANCE = 1e-4

each = pytest.mark.parametrize("name", families.known())


def kinds(loaded: LoadedModel) -> str:
    geometry = loaded.geometry
    attention = iter(layer.type[0] for layer in geometry.layers)
    places = range(len(geometry.layers) + len(geometry.states))
    return "".join("k" if i in geometry.states else next(attention) for i in places)


@each
def test_a_family(name: str, tmp_path: Path) -> None:
    loaded = families.loaded(name)
    assert kinds(loaded) == families.FAMILIES[name].layers
    context = prefill(loaded, families.DOCUMENT, chunk=50)
    ids = loaded.chat.first_turn(QUESTION)
    judge = families.eager(families.folder(name))
    wanted = full_logits(judge, context.ids, ids)
    assert wanted.std() > 0.01  # a model that says the same to everything would prove nothing

    save_prefill(context, tmp_path / "full.amkv", overwrite=False)
    compact(context, Request(method="keep"), errors=False).save(tmp_path / "keep.amkv", False)
    for file in ("full.amkv", "keep.amkv"):
        with Artifact.open(tmp_path / file) as artifact:
            assert artifact.ratio == 1.0
            again = restore(artifact, loaded)
        torch.testing.assert_close(cached_logits(again, ids), wanted, atol=TOLERANCE, rtol=0)
    wanted = full_logits(judge, context.ids, ids, singly=3)[-4:]
    cache = again.cache.fork()
    parts = [ids[:-3], *([token] for token in ids[-3:])]
    found = torch.stack([feed(loaded.model, cache, part) for part in parts])
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)

    options = Request(ratio=4, method="omp", queries="repeat", store="native", max_queries=64)
    compact(context, options, errors=False).save(tmp_path / "doc.amkv", overwrite=False)
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        assert 4 <= artifact.ratio < 4.5
        short = restore(artifact, loaded)
    mine, theirs = short.cache.get_states(), context.cache.get_states()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[place], theirs[place]) for place in mine)
    for i, layer in enumerate(loaded.geometry.layers):
        if layer.type != "full":
            assert short.cache.attention[i].prefix is None
            for a, b in zip(short.cache.live(i), context.cache.live(i), strict=True):
                assert torch.equal(a, b)
        else:
            prefix = short.cache.attention[i].prefix
            assert prefix is not None
            assert sum(prefix.lengths) < layer.kv_heads * context.T
    assert cached_logits(short, ids).isfinite().all()
    session = Session(short, max_tokens=3)
    assert isinstance("".join(session.ask(QUESTION)), str)
    assert session.turns == 1


@pytest.mark.parametrize("name", refusals.refused())
def test_what_cannot_work_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(str(refusals.refused_folder(name, tmp_path)), device="cpu", dtype="float32")
    message = caught.value.message
    assert message.startswith(f"the model type {name} is not supported: ")
    assert refusals.REFUSED[name].says in message
    assert "\n" not in message
    assert caught.value.hint


def test_transformers_own_generate_runs_on_a_compact_context() -> None:
    loaded = load("pocket", device="cpu")
    context = prefill(loaded, families.DOCUMENT)
    kept = compact(context, Request(method="keep"), errors=False)
    ids = torch.tensor([context.ids + loaded.chat.first_turn(QUESTION)])
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = loaded.model.generate(ids, **options)
    kept.apply()
    found = loaded.model.generate(ids, **{GENERATE: context.cache.fork()}, **options)
    assert found.tolist() == wanted.tolist()
