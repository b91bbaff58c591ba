"""Tensor parallelism: two processes, each with half of the heads, make and use the same files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from boxes import source

from amcli.commands.app import main
from amcli.entries.ragged import Entries
from amcli.entries.stores import quantizer_of
from amcli.models import sharding
from amcli.models.loading import load
from amcli.models.sharding import Shard
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.talk.session import Session
from amcli.storage.artifacts import Artifact

QUESTION = "What is in the first paragraph?"


def amkv(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "amcli", "-q", *words],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_two_processes_make_the_file_and_give_the_answer_of_one(tmp_path: Path) -> None:
    text, path = source(400), tmp_path / "doc.txt"
    path.write_text(text.text)
    loaded = load("pocket", dtype="float32", device="cpu")
    options = Request(ratio=6, method="omp", queries="repeat", store="int4")
    alone = compact(prefill(loaded, text), options)

    made = tmp_path / "two.amkv"
    words = ["--ratio", "6", "--queries", "repeat", "--store", "int4", "-o", str(made)]
    words += ["--dtype", "float32"]
    done = amkv(2, "compact", str(path), "--model", "pocket", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{made}\n"  # of the first process alone

    with Artifact.open(made) as artifact:
        assert [list(x.lengths) for x in alone.layers] == artifact.manifest["stored"]
        same = total = 0
        for i, mine in enumerate(alone.layers):
            theirs = artifact.heads(i).keys.unpack()
            near = (mine.keys.unpack() - theirs).norm(dim=1) < 0.02 * theirs.norm(dim=1)
            same, total = same + int(near.sum()), total + len(near)
        assert same >= 0.97 * total  # sums in another order may move the last key of a budget
        session = Session(restore(artifact, loaded), 24, 0.0, 0)
        answer = "".join(session.ask(QUESTION))
    short = ["--dtype", "float32", "--max-tokens", "24"]
    said = amkv(2, "chat", "--context", str(made), "-p", QUESTION, *short)
    assert said.returncode == 0, said.stderr
    assert said.stdout == answer + "\n"


@pytest.mark.parametrize(
    "words", [["prefill", "-"], ["chat", "--context", "{}"], ["demo"], ["eval"]], ids=lambda w: w[0]
)
def test_processes_share_no_keyboard(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `torchrun` tells its processes is in their environment."""
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    file = Path(__file__).parents[2] / "formats/vectors/good/compact-f32.amkv"
    assert main([word.format(file) for word in words]) == 2
    assert capsys.readouterr().err.startswith("error: 2 processes cannot ")


@pytest.mark.parametrize("store", ["native", "int8", "int4", "k4v2"])
def test_each_process_has_its_own_heads(store: str) -> None:
    lengths = (3, 0, 5, 1)
    N = sum(lengths)
    plain = Entries.of(torch.randn(N, 8), torch.randn(N, 4), torch.randn(N), lengths)
    entries = plain if store == "native" else quantizer_of(store).pack(plain)
    parts = [Shard(rank, 2).mine(entries) for rank in range(2)]
    assert [part.lengths for part in parts] == [(3, 0), (5, 1)]
    for name, tensor in entries.unpack().tensors().items():
        assert torch.equal(torch.cat([part.unpack().tensors()[name] for part in parts]), tensor)


@pytest.mark.parametrize("lengths", [(3, 1), (0, 4), (0, 0), (65, 2)])
@pytest.mark.parametrize("store", ["native", "int4", "k3v4"])
def test_heads_of_all_come_together(
    store: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a head, or all of a process, holds nothing; as if all processes had the same."""

    def twice(found: list[object], what: object) -> None:
        found[:] = [what, what]

    def copied(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
        for part in parts:
            part.copy_(mine)

    monkeypatch.setattr(sharding.distributed, "all_gather_object", twice)
    monkeypatch.setattr(sharding.distributed, "all_gather", copied)
    N = sum(lengths)
    plain = Entries.of(torch.randn(N, 8), torch.randn(N, 4).bfloat16().float(), None, lengths)
    entries = plain if store == "native" else quantizer_of(store).pack(plain)
    whole = Shard(0, 2).whole(entries)
    assert whole.lengths == 2 * lengths
    assert whole.store == store
    for name, part in entries.unpack().tensors().items():
        assert torch.equal(whole.unpack().tensors()[name], torch.cat([part, part]))
