"""Layers that keep a state: copied where a conversation forks, put back where a pass fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tinymodels as tiny
import torch

from amcli.commands.app import main
from amcli.commands.inspect import describe
from amcli.errors import AmkvError, ModelMismatchError
from amcli.models import generate
from amcli.models.cache import CompactCache
from amcli.models.generate import feed
from amcli.models.loading import LoadedModel, load
from amcli.models.state import StateLayer, placed
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.plan import Target
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import dense
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill, save_prefill
from amcli.pipeline.talk.session import Session
from amcli.serving.batching import batch_of
from amcli.storage.artifacts import Artifact, write_artifact
from amkv_format import AmkvFile

NAMES = ["qwen3_next", "lfm2", "nemotron_h"]
DOCUMENT, QUESTION = list(range(5, 30)), [7, 8, 9]

each = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> tuple[LoadedModel, CompactCache]:
    loaded = families.loaded(name)
    cache = CompactCache.empty(loaded.geometry)
    feed(loaded.model, cache, DOCUMENT)
    return loaded, cache


def states(cache: CompactCache) -> dict[tuple[int, str], torch.Tensor]:
    found = cache.get_states()
    assert found
    return found


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[place], two[place]) for place in one)


@each
def test_a_fork_goes_its_own_way(name: str) -> None:
    loaded, cache = read(name)
    before = states(cache)
    fork = cache.fork()
    first = feed(loaded.model, fork, QUESTION)
    assert same(states(cache), before)
    assert not same(states(fork), before)
    torch.testing.assert_close(feed(loaded.model, cache.fork(), QUESTION), first, rtol=0, atol=0)


@each
def test_a_fork_of_several_rows(name: str) -> None:
    loaded, cache = read(name)
    want = feed(loaded.model, cache.fork(), QUESTION)
    rows = torch.tensor([QUESTION, [9, 9, 9]])
    got = tiny.logits(loaded.model, rows, cache.fork(2))
    torch.testing.assert_close(got[0, -1], want, atol=1e-5, rtol=0)
    other = feed(loaded.model, cache.fork(), [9, 9, 9])
    torch.testing.assert_close(got[1, -1], other, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="cannot fork 2 sequences into 3"):
        cache.fork(2).fork(3)


@each
def test_a_pass_that_fails_leaves_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, cache = read(name)
    want, before = feed(loaded.model, cache.fork(), QUESTION), states(cache)

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loaded.model.lm_head, "forward", fail)  # all layers are through by then
        with pytest.raises(KeyboardInterrupt):
            feed(loaded.model, cache, QUESTION)
    assert same(states(cache), before)
    assert cache.get_seq_length() == len(DOCUMENT)
    torch.testing.assert_close(feed(loaded.model, cache, QUESTION), want, rtol=0, atol=0)


@each
def test_a_long_question_that_is_broken_off_leaves_the_conversation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = families.loaded(name)
    session = Session(prefill(loaded, families.DOCUMENT), max_tokens=3)
    list(session.ask(families.QUESTION))
    length, before = session.cache.get_seq_length(), states(session.cache)
    run, runs = generate.forward, iter([False, True])

    def run_once(*args: Any, **options: Any) -> Any:
        if next(runs):
            raise KeyboardInterrupt
        return run(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "forward", run_once)
        with pytest.raises(KeyboardInterrupt):
            list(session.ask("word " * (generate.CHUNK // 4)))
    assert next(runs, None) is None
    assert (session.turns, session.cache.get_seq_length()) == (1, length)
    assert same(states(session.cache), before)


def test_a_state_does_not_go_back() -> None:
    _, cache = read("lfm2")
    cache.truncate(len(DOCUMENT))
    with pytest.raises(ValueError, match="cannot go back"):
        cache.truncate(len(DOCUMENT) - 1)
    with pytest.raises(ValueError, match="cannot be batched"):
        batch_of([cache, cache])


def test_a_reset_cache_is_an_empty_one() -> None:
    loaded, cache = read("qwen3_next")
    assert cache.nbytes() > sum(x.numel() for x in states(cache).values())
    cache.reset()
    assert cache.nbytes() == 0
    assert cache.get_states() == {}
    want = feed(loaded.model, CompactCache.empty(loaded.geometry), QUESTION)
    torch.testing.assert_close(feed(loaded.model, cache, QUESTION), want, rtol=0, atol=0)


def test_a_layer_hands_out_copies() -> None:
    layer = StateLayer()
    layer.load({"conv": torch.ones(1, 4, 3)})
    layer.tensors()["conv"].zero_()
    assert layer.tensors()["conv"].sum() == 12
    assert layer.nbytes == 48


def test_a_state_that_is_not_all_numbers_is_not_compacted() -> None:
    """A file must not hold it, and whoever loaded one would be told nothing but nonsense."""
    context = prefill(families.loaded("qwen3_next"), families.DOCUMENT)
    found = states(context.cache)
    found[2, "recurrent"][0, 1, 2, 3] = torch.inf
    context.cache.set_states(found)
    says = "layer 2 of the model: 1 of 128 numbers of the recurrent state are infinite"
    with pytest.raises(AmkvError, match=says):
        compact(context, Request(method="keep"), errors=False)


def test_states_are_in_the_file_and_beside_the_ratio(tmp_path: Path) -> None:
    loaded = families.loaded("qwen3_next")
    context = prefill(loaded, families.DOCUMENT)
    found = compact(context, Request(ratio=4, method="omp", queries="repeat", max_queries=64))
    manifest = found.save(tmp_path / "doc.amkv", overwrite=False)
    assert "states" in manifest["features_required"]
    assert [(x["layer"], x["name"]) for x in manifest["states"]] == list(states(context.cache))
    assert len(manifest["model"]["layers"]) == 1
    with Artifact.open(tmp_path / "doc.amkv") as artifact:
        assert artifact.ratio >= 4
        kept = sum(x.numel() * x.element_size() for x in artifact.states().values())
        assert artifact.payload_bytes == found.stored_bytes + kept
        assert artifact.full_bytes == found.full_bytes + kept
        whole = artifact.full_bytes / artifact.payload_bytes
        assert found.whole_ratio == pytest.approx(whole)
        assert whole < found.ratio
        target = Target.of_artifact(artifact)
        assert target.states == Target.of(context).states == kept
        again = restore(artifact, loaded)
    assert same(states(again.cache), states(context.cache))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: {}, r"state conv of layer 0: file none, model \[1, 48, 4\]"),
        (lambda x: dict(list(x.items())[:-1]), "state recurrent of layer 2: file none, model"),
        (lambda x: {(i, f"x{n}"): t for (i, n), t in x.items()}, "conv of layer 0: file none"),
        (lambda x: {**x, (1, "conv"): x[0, "conv"]}, r"layer 1: file \[1, 48, 4\], model none"),
        (lambda x: {p: t[..., :-1] for p, t in x.items()}, r"file \[1, 48, 3\], model"),
        (lambda x: {p: torch.cat([t, t]) for p, t in x.items()}, r"file \[2, 48, 4\]"),
        (lambda x: {p: t.flatten() for p, t in x.items()}, r"file \[192\]"),
    ],
)  # fmt: skip
def test_states_that_are_not_the_models_are_refused(
    tmp_path: Path, change: Callable[[dict], dict], says: str
) -> None:
    """They would be taken for those of an empty text, or fail in the middle of the model."""
    loaded = families.loaded("qwen3_next")
    context = prefill(loaded, families.DOCUMENT)
    layers = [dense(context.cache, i) for i in range(len(loaded.geometry.layers))]
    manifest = {
        **context.manifest(),
        "kind": "prefill",
        "stored": [list(heads.lengths) for heads in layers],
    }
    path = tmp_path / "doc.amkv"
    write_artifact(path, manifest, context.ids, layers, change(states(context.cache)))
    with Artifact.open(path) as artifact, pytest.raises(ModelMismatchError, match=says):
        restore(artifact, loaded)


def test_inspect_reports_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = prefill(families.loaded("qwen3_next"), families.DOCUMENT)
    save_prefill(context, tmp_path / "doc.amkv", overwrite=False)
    with AmkvFile.open(tmp_path / "doc.amkv") as file:
        found = describe(file, tmp_path / "doc.amkv")["states"]
    sizes = {place: x.numel() * x.element_size() for place, x in states(context.cache).items()}
    assert {(x["layer"], x["name"]): x["bytes"] for x in found} == sizes
    assert main(["inspect", "--layers", str(tmp_path / "doc.amkv")]) == 0
    assert "states    of 2 layers without keys and values" in capsys.readouterr().out


def test_a_file_goes_to_a_model_in_another_dtype(tmp_path: Path) -> None:
    """What a convolution holds goes along; what a layer has made of all inputs stays exact."""
    loaded = families.loaded("qwen3_next")
    context = prefill(loaded, families.DOCUMENT)
    compact(context, Request(method="keep"), errors=False).save(tmp_path / "keep.amkv", False)
    half = load(str(families.folder("qwen3_next")), device="cpu", dtype="bfloat16")
    with Artifact.open(tmp_path / "keep.amkv") as artifact:
        again = restore(artifact, half)
    dtypes = {name: state.dtype for (_, name), state in states(again.cache).items()}
    assert dtypes == {"conv": torch.bfloat16, "recurrent": torch.float32}
    session = Session(again, max_tokens=2)
    list(session.ask("Who?"))
    assert session.turns == 1
    state = torch.ones(1, dtype=torch.bfloat16)
    assert placed("recurrent", state, half.device, torch.float32).dtype == torch.bfloat16
