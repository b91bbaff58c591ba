"""Artifacts that are written while their layers are fitted."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from boxes import model

from amcli.errors import OutOfMemoryError
from amcli.generator.documents import generate
from amcli.matching import methods
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.storage.artifacts import Artifact, NewArtifact, spec
from amkv_format import AmkvFile, writer


@pytest.fixture(scope="module")
def context() -> Context:
    return prefill(model("pocket"), Source("doc", generate(0, 150).text))


# With and without biases, all keys, fits of their own, keys that are turned, budgets over heads.
METHODS = ["omp", "omp-no-bias", "keep", "am-omp", "streaming", "kvzip"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "more",
    [{}, {"store": "native", "positions": True}, {"store": "k4v2"}],
    ids=["", "native", "k4v2"],
)
def test_it_is_the_file_that_saving_makes(
    method: str, more: dict[str, object], context: Context, tmp_path: Path
) -> None:
    shared = {"ratio": 3.0, "method": method, "queries": None} | more
    if methods.get(method).selection == "all":
        shared |= {"ratio": None, "store": more.get("store", "native")}
    options = Request(**shared)  # type: ignore[arg-type]
    with NewArtifact(tmp_path / "a.amkv") as new:
        found = compact(context, options, errors=False, into=new)
        early = found.finish(new)
    late = found.save(tmp_path / "b.amkv", overwrite=False)
    written = {"created": None, "manifest_hash": None}
    assert early | written == late | written  # the hash of the payload is in it
    with Artifact.open(tmp_path / "a.amkv") as artifact:
        assert artifact.store == found.plan.store
    with AmkvFile.open(tmp_path / "a.amkv") as file:
        file.verify()


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "qwen3_next"])
def test_so_it_is_with_windows_sinks_and_states(name: str, tmp_path: Path) -> None:
    loaded = families.loaded(name) if name == "qwen3_next" else model(name)
    context = prefill(loaded, Source("doc", "the quick brown fox jumps over a lazy dog " * 9))
    options = Request(ratio=3, queries="repeat", store="int8", positions=True, max_queries=256)
    with NewArtifact(tmp_path / "a.amkv") as new:
        found = compact(context, options, errors=False, into=new)
        early = found.finish(new)
    late = found.save(tmp_path / "b.amkv", overwrite=False)
    assert early["payload_hash"] == late["payload_hash"]
    assert early.get("states") == late.get("states")
    with AmkvFile.open(tmp_path / "a.amkv") as file:
        file.verify()


class Watching:
    """A `Progress` that calls something whenever heads are finished."""

    def __init__(self, see: Callable[[int], None]) -> None:
        self.see = see
        self.heads = 0
        self.fitting = False

    def start(self, stage: str, total: int) -> None:
        """A stage begins."""
        self.fitting = stage == "compact heads"

    def advance(self, units: int = 1) -> None:
        """Some of it is done."""
        if self.fitting:
            self.heads += units
            self.see(self.heads)


def one_at_a_time() -> Request:
    """Every head a bucket of its own."""
    return Request(ratio=8, method="omp", memory_limit=1)


def test_the_first_layers_are_in_the_file_before_the_last_are_fitted(
    context: Context, tmp_path: Path
) -> None:
    heads = sum(layer.kv_heads for layer in context.loaded.geometry.layers)
    written = 0

    def look(done: int) -> None:
        nonlocal written
        until = time.monotonic() + 20
        while done == heads - 1 and written <= 4 * context.T and time.monotonic() < until:
            data = next(tmp_path.iterdir()).read_bytes()
            written = len(data) - data.count(0)

    with NewArtifact(tmp_path / "a.amkv") as new:
        found = compact(context, one_at_a_time(), progress=Watching(look), into=new)
        found.finish(new)
    assert written > 4 * context.T  # more than the token ids


def test_an_interrupt_between_layers_leaves_nothing(context: Context, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), NewArtifact(tmp_path / "a.amkv") as new:
        compact(context, one_at_a_time(), progress=Watching(interrupt), into=new)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_in_the_background_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    x = torch.zeros(3, 4)

    def make() -> None:
        with NewArtifact(tmp_path / "a.amkv") as new:
            new.begin([spec("x", x)])
            monkeypatch.setattr(writer, "write_at", full)
            new.put("x", x)
            new.finish({})

    with pytest.raises(OutOfMemoryError, match="no space left to write"):
        make()
    assert list(tmp_path.iterdir()) == []
