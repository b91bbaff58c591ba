"""The statistics as kernels, against the plain path in float64.

Without a GPU the kernels run in Triton's interpreter, which cannot multiply bfloat16.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from amcli.kernels import STATISTICS
from amcli.matching.scores import SCORE_KINDS, ScoreState, attention_stats, logsumexp
from amcli.matching.tiles import Logits

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    Q: torch.Tensor
    K: torch.Tensor
    V: torch.Tensor
    fed: torch.Tensor | None
    logits: Logits
    limit: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def random(cls, seed: int, dtypes: list[torch.dtype], size: int) -> Case:
        pick, g = random.Random(seed), torch.Generator().manual_seed(seed)
        dtype, H = pick.choice(dtypes), pick.choice([1, 2, 3])
        d, dv = (pick.choice([8, 16, 40] if size == 1 else [64, 80, 128, 256]) for _ in range(2))
        n, T = pick.choice([1, 5, 70 * size]), pick.choice([1, 33, 100 * size])
        # As a cache hands them over: buffers with room to spare behind the tokens.
        K = torch.randn(H, T + 9, d, generator=g).to(dtype)[:, :T]
        V = torch.randn(H, T + 9, dv, generator=g).to(dtype)[:, :T]
        Q = (2 * torch.randn(H, n, d, generator=g)).to(dtype)
        fed = torch.randn(H, 7, d, generator=g).to(dtype) if pick.random() < 0.5 else None
        limit = torch.randint(0, T + 1, (n,), generator=g) if pick.random() < 0.4 else None
        bias = torch.randn(H, T, generator=g) if pick.random() < 0.4 else None
        if bias is not None and T > 1:
            bias[:, 1] = -torch.inf
        softcap = 3.0 if pick.random() < 0.3 else None
        return cls(Q, K, V, fed, Logits(d**-0.5, softcap), limit, bias)

    def on(self, device: str, dtype: torch.dtype | None = None) -> Case:
        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, dtype if x.is_floating_point() else None)

        fields = vars(self).items()
        return Case(**{k: move(x) if isinstance(x, torch.Tensor) else x for k, x in fields})

    def stats(self) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_stats(
            self.Q, self.K, self.V, self.logits, limit=self.limit, bias=self.bias
        )  # fmt: skip

    def scores(self) -> tuple[torch.Tensor, ScoreState]:
        state = ScoreState(
            *self.K.shape[:2], device=self.K.device,
            dtype=torch.promote_types(self.Q.dtype, torch.float32),
        )  # fmt: skip
        weights = torch.linspace(0.0, 1.0, self.Q.shape[1], device=self.Q.device)
        W = state.update(
            self.Q, self.K, self.logits, limit=self.limit, fed=self.fed,
            weights=weights.expand(self.Q.shape[:2]),
        )  # fmt: skip
        return W, state


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    seen = want.isfinite()
    assert torch.equal(got.cpu().isfinite(), seen)
    got, want = got.cpu().double()[seen], want.double()[seen]
    assert (got - want).norm() <= tolerance * (1e-6 + want.norm())


def check(case: Case, device: str) -> None:
    tolerance = TOLERANCE[case.Q.dtype]
    exact = case.on("cpu", torch.float64)
    there = case.on(device)
    for got, want in zip(there.stats(), exact.stats(), strict=True):
        close(got, want, tolerance)
    (W, state), (want_W, want_state) = there.scores(), exact.scores()
    close(W, want_W, tolerance)
    for kind in SCORE_KINDS:
        close(state.scores(kind), want_state.scores(kind), tolerance)


@pytest.mark.parametrize("seed", range(10))
def test_kernels_compute_what_the_plain_passes_do(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles for the GPU here")
    from amcli.kernels import statistics as kernels

    case = Case.random(seed, [torch.float32, torch.float16], 1)
    exact = case.on("cpu", torch.float64)
    want_lse, want_Y = exact.stats()
    lse, Y = kernels.row_stats(
        case.Q, case.K, case.V, case.logits.scale, case.logits.softcap, case.limit, case.bias
    )
    tolerance = TOLERANCE[case.Q.dtype]
    close(lse, want_lse, tolerance)
    close(Y, want_Y, tolerance)
    total = logsumexp(exact.Q, exact.K, case.logits, limit=case.limit)
    state = ScoreState(*case.K.shape[:2], dtype=torch.float64)
    state.update(exact.Q, exact.K, case.logits, limit=case.limit)
    kinds = frozenset(SCORE_KINDS)
    paid = kernels.column_stats(
        case.Q, case.K, total.float(), case.logits.scale, case.logits.softcap, case.limit, kinds
    )
    n = case.Q.shape[1]
    close(paid["max"], state.scores("max"), tolerance)
    close((paid["rms"] / n).sqrt(), state.scores("rms"), tolerance)
    close(paid["mean"] / n, state.scores("mean"), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 130))
def test_on_cuda_too(seed: int) -> None:
    check(Case.random(seed, [torch.float32, torch.float16, torch.bfloat16], 7), "cuda")
    assert STATISTICS.broken == []


def test_the_processor_keeps_to_plain_pytorch() -> None:
    check(Case.random(3, [torch.float32], 1), "cpu")
