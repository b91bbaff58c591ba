"""The Triton kernels against the plain path, which test_models_attend.py holds to the definition.

Without a GPU the kernels run in Triton's interpreter, which cannot multiply bfloat16.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from amcli.entries.prefix import Prefix
from amcli.entries.ragged import Entries
from amcli.entries.stores import quantizer_of
from amcli.errors import AmkvWarning
from amcli.kernels.attention.plan import make_plan, tile_size
from amcli.kernels.fused import Fused
from amcli.models import attend as module
from amcli.models.attend import attend
from amcli.models.failures import quiet
from amcli.serving.batching import BatchedPrefix

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass
class Case:
    query: torch.Tensor
    prefix: Any  # a prefix or None
    keys: torch.Tensor
    values: torch.Tensor
    options: dict[str, Any]

    def to(self, device: str) -> Case:
        tensors = (self.query, self.prefix, self.keys, self.values)
        moved = (None if x is None else x.to(device) for x in tensors)
        options = {
            k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in self.options.items()
        }
        return Case(*moved, options)  # type: ignore[arg-type]

    def plain(self) -> torch.Tensor:
        return attend(self.query, self.prefix, self.keys, self.values, **self.options)

    def by_kernels(self) -> torch.Tensor:
        """With room, and a prefix or none."""
        from amcli.kernels.attention.launch import attend_prefix

        H, d, dv = self.keys.shape[1], self.keys.shape[3], self.values.shape[3]
        prefix = (
            module._nothing(H, d, dv, self.query.device) if self.prefix is None else self.prefix
        )
        given = {"softcap": None, "sinks": None, "live": None, **self.options}
        given["window"] = given.get("window") or self.keys.shape[2]
        return attend_prefix(self.query, prefix, self.keys, self.values, **given)

    def fast(self) -> torch.Tensor:
        from amcli.kernels.attention.launch import attend_prefix, can_attend

        assert can_attend(self.query, self.prefix)
        options = {"softcap": None, "sinks": None, "live": None, **self.options}
        return attend_prefix(self.query, self.prefix, self.keys, self.values, **options)


def entries(
    lengths: tuple[int, ...], d: int, dv: int, dtype: torch.dtype, store: str, biased: bool
) -> Entries:
    N = sum(lengths)
    numbers = Entries.of(
        torch.randn(N, d).to(dtype),
        torch.randn(N, dv).to(dtype),
        2 * torch.randn(N) if biased else None,
        lengths,
    )
    return numbers if store == "native" else quantizer_of(store).pack(numbers)


def random_case(
    seed: int,
    dtypes: list[torch.dtype],
    scale: int,
    stores: Sequence[str] = ("native", "int8", "int4"),
) -> Case:
    """Anything the kernels take; `scale` sets how large."""
    dims = [16, 40, 64, 80] if scale == 1 else [64, 80, 96, 112, 128, 192, 256]
    pick = random.Random(seed)
    torch.manual_seed(seed)
    dtype, store = pick.choice(dtypes), pick.choice(stores)
    d, dv = pick.choice(dims), pick.choice(dims)
    H, g, B = pick.choice([1, 2, 3]), pick.choice([1, 2, 4, 7]), pick.choice([1, 2, 3])
    m = pick.choice([1, 1, 1, 2, 5, 16, 14 * scale + 3])
    if m > 5 and scale == 1:
        g, B = 2, 1  # the interpreter is slow
    n = m + pick.choice([0, 1, 30, 65 * scale])

    def context() -> Entries:
        lengths = tuple(pick.choice([0, 1, 64, 70 * scale]) for _ in range(H))
        return entries(lengths, d, dv, dtype, store, pick.random() < 0.5)

    contexts = [context() for _ in range(pick.choice([1, 1, 2]))]
    prefix: Prefix = contexts[0]
    if len(contexts) > 1:
        prefix = BatchedPrefix.join([pick.choice(contexts) for _ in range(B)])
    options: dict[str, Any] = {"scaling": 2 * d**-0.5}
    if pick.random() < 0.3:
        options["softcap"] = 3.0
    if pick.random() < 0.3:
        options["sinks"] = torch.randn(H * g).to(dtype)
    if pick.random() < 0.3:
        options["live"] = torch.rand(B, n) > 0.4
    # As models and caches hand them over: heads after tokens, and buffers with room to spare.
    query = torch.randn(B, m, H * g, d).to(dtype).transpose(1, 2)
    keys = torch.randn(B, H, n + 7, d).to(dtype)[:, :, :n]
    values = torch.randn(B, H, n + 7, dv).to(dtype)[:, :, :n]
    return Case(query, prefix, keys, values, options)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < TOLERANCE[want.dtype], f"relative error {error:.1e}"


def interpreter() -> None:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles for the GPU here")


@pytest.mark.parametrize("seed", range(14))
def test_the_kernels_compute_what_the_plain_path_computes(seed: int) -> None:
    interpreter()
    case = random_case(seed, [torch.float32, torch.float32, torch.float16], 1)
    assert_close(case.fast(), case.plain())


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 160))
def test_on_cuda_too(seed: int) -> None:
    case = random_case(seed, [torch.float32, torch.float16, torch.bfloat16], 10)
    want = attend(
        case.query.double(), case.prefix, case.keys.double(), case.values.double(), **case.options
    )
    there = case.to("cuda")
    assert_close(there.fast().cpu(), want.to(case.query.dtype))
    got = attend(there.query, there.prefix, there.keys, there.values, **there.options)
    assert_close(got.cpu(), want.to(got.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (80, 96), (256, 256)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_long_chunks_without_a_prefix_on_cuda(
    dtype: torch.dtype, dims: tuple[int, int], softcap: float | None
) -> None:
    """And the mass that observers are told."""
    (d, dv), B, H, g, m, n = dims, 2, 3, 4, 500, 777
    q = torch.randn(B, m, H * g, d).to(dtype).transpose(1, 2)
    k, v = (torch.randn(B, H, n + 9, x).to(dtype)[:, :, :n] for x in (d, dv))
    want = attend(q.double(), None, k.double(), v.double(), softcap=softcap)
    got, mass = module.attend_with_mass(
        *(x.cuda() if x is not None else None for x in (q, None, k, v)), softcap=softcap
    )
    assert_close(got.cpu(), want.to(dtype))
    s = q.double().view(B, H, g, m, d) @ k.double()[:, :, None].mT * d**-0.5
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s.masked_fill(torch.ones(m, n).triu(n - m + 1).bool(), -torch.inf)
    assert mass is not None
    assert (mass.cpu() - s.logsumexp(-1).view(B, H * g, m)).abs().max() < 1e-3
    assert module.STATISTICS.broken == []


def test_a_long_chunk_of_queries_is_taken_in_slices_of_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpreter()
    from amcli.kernels.attention import launch

    torch.manual_seed(0)
    prefix = entries((90, 3), 16, 32, torch.float32, "native", True)
    query = torch.randn(1, 4, 70, 16)
    keys, values = torch.randn(1, 2, 81, 16), torch.randn(1, 2, 81, 32)
    case = Case(query, prefix, keys, values, {"scaling": 0.3, "live": torch.rand(1, 81) > 0.3})
    monkeypatch.setattr(launch, "PART_BYTES", 10_000)
    sizes: list[int] = []
    one = launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda *args: sizes.append(args[0].shape[2]) or one(*args)
    )
    assert_close(case.fast(), case.plain())
    assert len(sizes) > 3
    assert sum(sizes) == 70


def test_what_the_kernels_cannot_do_they_decline() -> None:
    interpreter()
    from amcli.kernels.attention.launch import can_attend

    def declines(query: torch.Tensor, d: int, store: str = "native") -> bool:
        return not can_attend(query, entries((4, 0), d, 16, torch.float32, store, False))

    query = torch.randn(1, 2, 1, 16)
    assert not declines(query, 16)
    assert declines(query.double(), 16)
    assert declines(query.clone().requires_grad_(), 16)
    assert declines(query, 320)
    assert declines(query, 44, "int4")  # blocks of 22 numbers share pairs of bytes


@pytest.mark.parametrize("tile", [64, 256])
def test_tiles_cover_every_entry_once_however_uneven_the_heads(tile: int) -> None:
    lengths = (1000, 0, 7, 12_000, 64, 500)
    parts = [entries(lengths, 2, 2, torch.float32, "native", False) for _ in range(2)]
    unseen = BatchedPrefix.join([*parts, parts[0]]).select([1, 1, 1, 1, 1])
    both = BatchedPrefix.join([parts[1], parts[0], parts[1], parts[1]])
    for prefix, readers in ((parts[0], [3]), (both, [3, 1]), (unseen, [0, 5])):
        plan = make_plan(prefix, sum(readers), tile)
        covered, slots = [], []
        flat = prefix.entries
        for first, count, h, slot, start, rows, *_ in plan.tiles.tolist():
            context = int(first >= sum(lengths))
            assert 0 < count <= tile
            assert flat.offsets[context * 6 + h] <= first
            assert first + count <= flat.offsets[context * 6 + h + 1]
            assert rows == readers[context]
            seen_by = plan.order[start : start + rows].tolist()
            assert all(plan.rows[b].tolist()[:2] == [context, i] for i, b in enumerate(seen_by))
            covered += range(first, first + count)
            slots += range(slot, slot + rows)
        wanted = [p * sum(lengths) + i for p, r in enumerate(readers) if r for i in range(13_571)]
        assert sorted(covered) == wanted
        assert sorted(slots) == list(range(plan.slots))


def test_a_plan_is_made_once_for_a_prefix_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter()
    from amcli.kernels.attention import plan

    made: list[int] = []
    one = plan.make_plan
    monkeypatch.setattr(plan, "make_plan", lambda *args: made.append(args[1]) or one(*args))
    prefix = entries((40, 9), 16, 16, torch.float32, "int4", False)
    for n in (3, 4, 5):
        keys = torch.randn(2, 2, n, 16)
        Case(torch.randn(2, 2, 1, 16), prefix, keys, keys, {"scaling": 1.0}).fast()
    assert made == [2]


@pytest.mark.parametrize(
    ("keys", "blocks", "tile"),
    [(1, 1, 64), (132 * 200, 1, 128), (132 * 200, 8, 1024), (10**9, 9, 1 << 14)],
)
def test_tiles_are_as_large_as_a_busy_device_allows(keys: int, blocks: int, tile: int) -> None:
    assert tile_size(keys, blocks) == tile


def kernels_that(raise_error: Exception | None) -> Any:
    """The kernels' module on a machine where they fail, or where they answer 7."""

    class Kernels:
        @staticmethod
        def can_attend(query: torch.Tensor, prefix: Entries) -> bool:
            return query.shape[0] == 1

        @staticmethod
        def attend_prefix(query: torch.Tensor, *rest: Any) -> torch.Tensor:
            if raise_error is not None:
                raise raise_error
            return torch.full_like(query, 7.0)

    return Kernels


def given(kernels: Any) -> Fused:
    """What is chosen where those are the kernels."""
    return Fused("attention", kernels)


def test_kernels_are_launched_on_the_device_of_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--device cuda:1` the current device is still the first one."""
    current: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    class Kernels(kernels_that(None)):
        @staticmethod
        def attend_prefix(query: torch.Tensor, *rest: Any) -> torch.Tensor:
            assert [x is query for x in current] == [True]
            return query

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(module, "KERNELS", given(Kernels))
    query, prefix = torch.randn(1, 2, 1, 8), entries((3,), 8, 8, torch.float32, "native", False)
    assert module.by_kernels(query, prefix) is query
    assert current == []


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_cuda_device_that_is_not_the_current_one() -> None:
    case = random_case(107, [torch.float32], 10)
    there = case.to("cuda:1")
    got = attend(there.query, there.prefix, there.keys, there.values, **there.options)
    assert module.KERNELS.broken == []
    assert_close(got.cpu(), case.plain())


def test_where_kernels_do_not_compile_the_plain_path_takes_over_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    query, prefix = torch.randn(1, 2, 1, 8), entries((3,), 8, 8, torch.float32, "native", False)
    arguments = (torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8), 1.0, None, None, None)
    monkeypatch.setattr(module, "KERNELS", given(kernels_that(None)))
    assert module.by_kernels(query, prefix, *arguments) is not None
    assert module.by_kernels(query.expand(2, -1, -1, -1), prefix, *arguments) is None

    full = kernels_that(torch.OutOfMemoryError("full"))
    monkeypatch.setattr(module, "KERNELS", given(full))
    with pytest.raises(torch.OutOfMemoryError):
        module.by_kernels(query, prefix, *arguments)

    failing = kernels_that(RuntimeError("Failed to find C compiler"))
    monkeypatch.setattr(module, "KERNELS", given(failing))
    for _ in range(3):
        assert module.by_kernels(query, prefix, *arguments) is None
    assert [str(w.message) for w in recwarn] == [
        "the attention kernels cannot run here, so it takes longer: "
        "RuntimeError: Failed to find C compiler"
    ]


def test_the_warning_is_heard_where_libraries_are_silenced() -> None:
    failing = given(kernels_that(RuntimeError("no compiler")))
    with pytest.warns(AmkvWarning, match="kernels cannot run here"), quiet():
        failing.run(torch.zeros(1), lambda kernels: kernels.attend_prefix(torch.zeros(1)))


def test_the_processor_keeps_to_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: Any) -> None:
        raise RuntimeError("kernels on the CPU")

    monkeypatch.setattr(module, "by_kernels", unexpected)
    assert random_case(3, [torch.float32], 1).plain().isfinite().all()
