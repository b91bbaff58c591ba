"""`attend` against the definition, written out in float64 one query at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amcli.entries.ragged import Entries
from amcli.entries.stores import quantizer_of
from amcli.models import attend as module
from amcli.models import seen
from amcli.models.attend import attend, attend_with_mass


def reference(
    query: torch.Tensor,
    prefix: Entries | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    live: torch.Tensor | None = None,
) -> torch.Tensor:
    """One softmax a query over [prefix, what it sees of the live tokens, sink]."""
    B, Hq, m, _ = query.shape
    H, n, dv = values.shape[1:]
    heads = list(prefix.heads()) if prefix is not None else None
    out = torch.zeros(B, m, Hq, dv, dtype=torch.float64)
    for b in range(B):
        for hq in range(Hq):
            h = hq // (Hq // H)
            for i in range(m):
                q, at, terms = query[b, hq, i].double(), n - m + i, []
                if heads is not None:
                    C_k, C_v, beta = heads[h]
                    for j in range(len(C_k)):
                        bias = 0.0 if beta is None else float(beta[j])
                        terms.append((capped(q @ C_k[j].double(), scaling, softcap) + bias, C_v[j]))
                for j in range(at + 1):
                    hidden = live is not None and not live[b, j]
                    far = window is not None and j <= at - window
                    if not far and not (hidden and j != at):
                        logit = capped(q @ keys[b, h, j].double(), scaling, softcap)
                        terms.append((logit, values[b, h, j]))
                mass = sum(math.exp(s) for s, _ in terms)
                mass += 0.0 if sinks is None else math.exp(float(sinks[hq]))
                out[b, i, hq] = sum(math.exp(s) * v.double() for s, v in terms) / mass
    return out


def capped(dot: torch.Tensor, scaling: float, softcap: float | None) -> float:
    s = float(dot) * scaling
    return s if softcap is None else softcap * math.tanh(s / softcap)


def case(
    B: int, Hq: int, H: int, m: int, n: int, lengths: tuple[int, ...] | None, seed: int = 0
) -> tuple[torch.Tensor, Entries | None, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    d, dv = 8, 6
    prefix = None
    if lengths is not None:
        N = sum(lengths)
        prefix = Entries.of(
            torch.randn(N, d, generator=g),
            torch.randn(N, dv, generator=g),
            2 * torch.randn(N, generator=g),
            lengths,
        )
    query = 2 * torch.randn(B, Hq, m, d, generator=g)
    keys = torch.randn(B, H, n, d, generator=g)
    return query, prefix, keys, torch.randn(B, H, n, dv, generator=g)


PADDED = torch.tensor([[True] * 9, [False] * 3 + [True] * 6])
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])

CASES: dict[str, tuple[tuple[int, ...] | None, int, dict[str, Any]]] = {
    "plain": (None, 9, {}),
    "continuation": (None, 4, {}),
    "one query": (None, 1, {}),
    "window": (None, 9, {"window": 3}),
    "window, one query": (None, 1, {"window": 3}),
    "window wider than the sequence": (None, 9, {"window": 9}),
    "padding": (None, 9, {"live": PADDED}),
    "padding and window": (None, 5, {"live": PADDED, "window": 4}),
    "softcap": (None, 5, {"softcap": 1.5}),
    "softcap and window": (None, 9, {"softcap": 1.5, "window": 2}),
    "sinks": (None, 5, {"sinks": SINKS}),
    "ragged": ((7, 2), 5, {}),
    "ragged, an empty head": ((0, 11), 9, {}),
    "ragged, nothing stored": ((0, 0), 5, {}),
    "ragged, one query": ((7, 2), 1, {}),
    "ragged, softcap before beta": ((7, 2), 5, {"softcap": 1.5}),
    "ragged, sinks": ((7, 2), 5, {"sinks": SINKS}),
    "ragged, padding": ((7, 2), 5, {"live": PADDED}),
    "ragged, all of it": ((3, 8), 5, {"live": PADDED, "sinks": SINKS, "softcap": 3.0}),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("max_scores", [2**26, 40], ids=["one tile", "many tiles"])
def test_attend_equals_the_definition(
    name: str, max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "MAX_SCORES", max_scores)
    lengths, m, options = CASES[name]
    query, prefix, keys, values = case(2, 4, 2, m, 9, lengths)
    got = attend(query, prefix, keys, values, scaling=0.4, **options)
    want = reference(query, prefix, keys, values, scaling=0.4, **options)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("m", [9, 4])
def test_the_branch_for_flash_kernels_is_lower_right_causal(
    m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU the same call materialises its mask; what it must mean is the same."""
    monkeypatch.setattr(module, "flash_takes", lambda q, values: True)
    query, _, keys, values = case(2, 4, 2, m, 9, None)
    got = attend(query, None, keys, values, scaling=0.4)
    want = reference(query, None, keys, values, scaling=0.4)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("m", [9, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mass_that_comes_with_the_output(m: int, dtype: torch.dtype) -> None:
    """On a CPU from what came before the queries and from themselves, put together."""
    g = torch.Generator().manual_seed(1)
    # As models hand them over: heads side by side in each token, buffers with room to spare.
    query = (2 * torch.randn(2, m, 4, 8, generator=g)).to(dtype).transpose(1, 2)
    keys, values = (torch.randn(2, 2, 13, 8, generator=g).to(dtype)[:, :, :9] for _ in range(2))
    out, mass = attend_with_mass(query, None, keys, values, scaling=0.4)
    want = reference(query, None, keys, values, scaling=0.4)
    exact = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), want, atol=exact, rtol=0)
    logits = query.double() @ keys.double().repeat_interleave(2, 1).mT * 0.4
    later = torch.ones(m, 9).triu(9 - m + 1).bool()
    assert mass is not None
    torch.testing.assert_close(
        mass.double(), logits.masked_fill(later, -math.inf).logsumexp(-1), atol=exact, rtol=exact
    )


def test_scaling_defaults_to_the_root_of_the_key_dimension() -> None:
    query, prefix, keys, values = case(1, 4, 2, 3, 5, (4, 1))
    want = attend(query, prefix, keys, values, scaling=8**-0.5)
    torch.testing.assert_close(attend(query, prefix, keys, values), want, atol=0, rtol=0)


def test_float64_is_not_rounded() -> None:
    query, prefix, keys, values = case(1, 4, 2, 3, 5, (4, 1))
    double = attend(query.double(), prefix, keys.double(), values.double(), scaling=0.4)
    want = reference(query, prefix, keys, values, scaling=0.4)
    torch.testing.assert_close(double, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("lengths", [(5000, 300), None], ids=["prefix", "softcap"])
def test_memory_stays_bounded(
    lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 40_000
    monkeypatch.setattr(seen, "MAX_SCORES", limit)
    query, prefix, keys, values = case(1, 4, 2, 300, 900, lengths)
    with Largest() as largest:
        attend(query, prefix, keys, values, softcap=5.0)
    assert query.numel() < largest.elements <= 1.2 * limit


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("store", ["native", "int8", "int4", "k4v4", "k3v2"])
def test_gradients_are_those_of_the_result(store: str, softcap: float | None) -> None:
    """Kernels decline where gradients are wanted: they are to be had here."""
    torch.manual_seed(0)
    numbers = Entries.of(torch.randn(9, 8), torch.randn(9, 8), torch.randn(9), (3, 6))
    prefix: Entries = numbers if store == "native" else quantizer_of(store).pack(numbers)
    q, k, v = (
        torch.randn(1, heads, 4, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def result(q: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return attend(q, prefix, *more[:2], softcap=softcap, sinks=more[2])

    assert torch.autograd.gradcheck(result, (q[:, :, -3:], k, v, sinks))


def test_a_window_with_a_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="sliding window"):
        attend(*case(1, 4, 2, 3, 5, (4, 1)), window=3)


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, _, keys, values = case(1, 4, 2, 3, 5, None)
    with pytest.raises(ValueError, match="3 queries, 2 live tokens"):
        attend(query, None, keys[:, :, :2], values[:, :, :2])
    with pytest.raises(ValueError, match="prefix has 3 heads"):
        attend(query, case(1, 4, 2, 3, 5, (1, 1, 1))[1], keys, values)
