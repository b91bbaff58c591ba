"""The whole compaction in float32 on a GPU and on the CPU: one function, one result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boxes import source

from amcli.models.loading import LoadedModel, load
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.talk.session import Session
from amcli.storage.artifacts import Artifact

CHECKED = [
    Request(ratio=10, method="omp", queries="repeat", store="native"),
    Request(ratio=30, method="omp", queries="repeat", store="int4"),
    Request(ratio=10, method="highest-attention", queries="context", store="int8"),
    Request(ratio=10, method="am-omp", queries="repeat"),
    Request(ratio=10, method="kvzip"),
]


def on(device: str, options: Request) -> tuple[LoadedModel, Compaction]:
    """With as many queries on both devices, which have their own defaults."""
    loaded = load("pocket", device=device, dtype="float32")
    same = replace(options, max_queries=2048)
    return loaded, compact(prefill(loaded, source(1500)), same)


@pytest.mark.gpu
@pytest.mark.parametrize("options", CHECKED, ids=lambda o: f"{o.method}-{o.store}")
def test_gpu_and_cpu_agree_in_float32(options: Request) -> None:
    """Sums in another order move scores by a few units in the last place, so that a key at the
    end of a budget may be another one. Errors, sizes and what is kept agree all the same."""
    _, cpu = on("cpu", options)
    _, gpu = on("cuda", options)
    assert gpu.layers[0].lengths  # computed, not refused
    sizes = [sum(heads.lengths) for c in (cpu, gpu) for heads in c.layers]
    half = len(sizes) // 2
    assert sum(sizes[:half]) == sum(sizes[half:])
    shared = total = 0
    for mine, theirs in zip(cpu.layers, gpu.layers, strict=True):
        for (a, _, _), (b, _, _) in zip(
            mine.unpack().heads(), theirs.to("cpu").unpack().heads(), strict=True
        ):
            near = torch.cdist(a.float(), b.float()).amin(1) < 0.05 * a.float().norm(dim=1)
            shared, total = shared + int(near.sum()), total + len(a)
    assert shared >= 0.97 * total
    assert cpu.errors is not None
    assert gpu.errors is not None
    for here, there in zip(cpu.errors.output, gpu.errors.output, strict=True):
        assert there == pytest.approx(here, rel=0.1, abs=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["native", "int8", "int4", "k4v4", "k3v2"])
def test_a_context_goes_to_the_gpu_as_it_is_in_the_file(store: str, tmp_path: Path) -> None:
    loaded, found = on("cuda", Request(ratio=8, method="highest-attention", store=store))
    found.save(tmp_path / "a.amkv", overwrite=False)
    with Artifact.open(tmp_path / "a.amkv") as artifact:
        read = restore(artifact, loaded)
        for i, heads in enumerate(found.layers):
            there, here = artifact.heads(i, "cuda").unpack(), heads.unpack()
            assert there.device.type == "cuda"
            assert torch.equal(there.keys.unpack(), here.keys.unpack().to("cuda"))
            assert torch.equal(there.values.unpack(), here.values.unpack().to("cuda"))
    assert read.cache.nbytes() == found.stored_bytes


@pytest.mark.gpu
def test_two_gpus_answer_as_one(tmp_path: Path) -> None:
    """`--device-map auto`: entries are where their layer is, and tokens are the same."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    text = source(1500)
    one, two = (load("pocket", device=name, dtype="float32") for name in ("cuda", "auto"))
    assert len(set(two.geometry.devices)) == 2
    options = Request(ratio=8, method="omp", queries="repeat", store="int4")
    answers = []
    for loaded in (one, two):
        compact(prefill(loaded, text), options).save(tmp_path / "a.amkv", overwrite=True)
        with Artifact.open(tmp_path / "a.amkv") as artifact:
            context = restore(artifact, loaded)
        for layer, place in zip(context.cache.attention, loaded.geometry.devices, strict=True):
            assert layer.prefix.store != "native"
            assert layer.prefix.device == place
        session = Session(context, 32, 0.0, 0)
        answers.append("".join(session.ask("What is in the first paragraph?")))
    assert answers[0] == answers[1]
