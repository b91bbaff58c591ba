"""A store that nobody has heard of: its form and its quantizer are here, and all else takes it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from boxes import model, source

from amcli.entries import catalogue, stores
from amcli.entries.matrix import Matrix
from amcli.entries.ragged import Entries, appended
from amcli.entries.stores import Quantizer, quantizer_of, register
from amcli.models.attend import attend
from amcli.models.calling import run
from amcli.models.sharding import Shard
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.plan import Target
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import full_layers
from amcli.pipeline.contexts.joining import join
from amcli.pipeline.contexts.reading import prefill
from amcli.serving.batching import BatchedPrefix
from amkv_format import STORES, FormatError


@dataclass(frozen=True)
class Ranges(Matrix):
    """Asymmetric codes: a number of row `n` is `code * step[n] + low[n]`."""

    codes: torch.Tensor  # [N, d] uint8
    step: torch.Tensor  # [N, 1] float32
    low: torch.Tensor  # [N, 1] float32

    store = "ranges"

    @property
    def shape(self) -> tuple[int, int]:
        N, d = self.codes.shape
        return N, d

    def parts(self) -> dict[str, torch.Tensor]:
        return {"": self.codes, ".step": self.step, ".low": self.low}

    def with_parts(self, parts: Sequence[torch.Tensor]) -> Ranges:
        return Ranges(*parts)

    def stored(self) -> torch.Tensor:
        return self.codes * self.step + self.low


class RangesQuantizer(Quantizer):
    name = "ranges"

    def keys(self, x: torch.Tensor, lengths: tuple[int, ...]) -> Ranges:
        x = x.float()
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        step = ((high - low) / 255).clamp(1e-12)
        return Ranges(((x - low) / step).round().to(torch.uint8), step, low)

    values = keys

    def read_keys(self, parts: Mapping[str, torch.Tensor], lengths: tuple[int, ...]) -> Ranges:
        return Ranges(parts[""], parts[".step"], parts[".low"])

    read_values = read_keys

    def entry_bytes(self, key_dim: int, value_dim: int) -> int:
        return key_dim + value_dim + 16


@pytest.fixture(autouse=True)
def ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[Quantizer]:
    monkeypatch.setitem(catalogue.STORES, "ranges", "8 bits a number, and a range a row")
    register(RangesQuantizer())
    yield stores.QUANTIZERS["ranges"]
    del stores.QUANTIZERS["ranges"]


def numbers(*lengths: int, beta: bool = True, seed: int = 0) -> Entries:
    N, generator = sum(lengths), torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(N, d, generator=generator) for d in (8, 6))
    biases = torch.randn(N, generator=generator) if beta else None
    return Entries.of(keys, values, biases, lengths)


def same(one: Entries, other: Entries) -> None:
    assert one.lengths == other.lengths
    for (name, x), (there, y) in zip(one.tensors().items(), other.tensors().items(), strict=True):
        assert name == there
        assert torch.equal(x, y)


def test_what_is_written_once_for_all_stores_holds_for_it(ranges: Quantizer) -> None:
    plain = numbers(3, 0, 5)
    coded = ranges.pack(plain)
    assert (coded.store, coded.key_dim, coded.value_dim) == ("ranges", 8, 6)
    assert coded.nbytes == 8 * (ranges.entry_bytes(8, 6) + 4)
    assert coded.rows([slice(0, 0)], (0, 0, 0)).nbytes == 0
    torch.testing.assert_close(coded.keys.unpack(), plain.keys.unpack(), atol=0.02, rtol=0)
    same(Entries.cat([coded.of_heads(0, 1), coded.of_heads(1, 3)]), coded)
    same(coded.to("cpu", torch.float16), coded)
    assert list(coded.tensors())[:3] == ["keys", "keys.step", "keys.low"]
    same(stores.read("ranges", coded.tensors(), coded.lengths), coded)
    for (k, v, beta), (pk, pv, pbeta) in zip(coded.heads(), coded.unpack().heads(), strict=True):
        assert torch.equal(k, pk)
        assert torch.equal(v, pv)
        assert beta is not None
        assert torch.equal(beta, pbeta)
    behind = appended([coded, ranges.pack(numbers(1, 2, 0, beta=False))], torch.float32)
    assert (behind.store, behind.lengths) == ("ranges", (4, 2, 5))
    mixed = appended([coded, quantizer_of("int8").pack(plain)], torch.float32)
    assert mixed.store == "native"
    same(Shard(1, 3).mine(coded), coded.of_heads(1, 2))


def test_attention_reads_it(ranges: Quantizer) -> None:
    torch.manual_seed(0)
    one, two = ranges.pack(numbers(3, 4)), ranges.pack(numbers(2, 0, beta=False, seed=1))
    query, keys = torch.randn(2, 4, 2, 8), torch.randn(2, 2, 5, 8)
    values = torch.randn(2, 2, 5, 6)
    got = attend(query, one, keys, values)
    assert torch.equal(got, attend(query, one.unpack(), keys, values))
    both = attend(query, BatchedPrefix.join([one, two]), keys, values)
    torch.testing.assert_close(both[:1], got[:1], atol=1e-6, rtol=0)


def test_kernels_that_do_not_know_it_leave_it_alone(ranges: Quantizer) -> None:
    pytest.importorskip("triton")
    from amcli.kernels.attention.launch import can_attend

    plain, query = numbers(3, 4), torch.randn(1, 2, 1, 8)
    assert can_attend(query, plain)
    assert not can_attend(query, ranges.pack(plain))


def test_a_document_is_compacted_to_it_and_read_on(tmp_path: Path) -> None:
    context = prefill(model("pocket"), source(120))
    found = compact(context, Request(ratio=6, store="ranges", max_queries=128, seed=1))
    assert {found.layers[i].store for i in full_layers(context)} == {"ranges"}
    assert found.stored_bytes == sum(
        sum(x.lengths) * shape.entry_bytes(x.beta is not None)
        for x, shape in zip(found.layers, Target.of(context).shapes("ranges"), strict=True)
    )
    assert found.errors is not None
    plain = replace(found, layers=[x.unpack() for x in found.layers], context=again(context))
    found.apply()
    plain.apply()
    ids, answers = torch.tensor([context.ids[5:17]]), []
    for cache in (found.context.cache, plain.context.cache):
        with torch.no_grad():
            network = context.loaded.model
            answers.append(run(network, cache.fork(), ids).logits)
    assert torch.equal(*answers)
    joined = join([found.context, found.context])
    assert {layer.prefix.store for layer in joined.cache.attention} == {"ranges"}
    with pytest.raises(FormatError, match="store"):  # until the format has its paragraph
        found.save(tmp_path / "doc.amkv", overwrite=False)


def again(context):  # type: ignore[no-untyped-def]
    return replace(context, cache=context.cache.fork())


def test_the_catalogue_is_what_there_is(ranges: Quantizer) -> None:
    assert quantizer_of("ranges") is ranges
    known = [name for name in catalogue.STORES if name != "ranges"]
    assert known == list(STORES)
    for name in known[1:]:
        assert quantizer_of(name).name == name


def test_the_catalogue_imports_no_torch() -> None:
    code = "import sys, amcli.entries.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
