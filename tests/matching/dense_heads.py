"""A layer with grouped heads and its own causal attention, written out one query at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from amcli.matching.layers import compact_layer
from amcli.matching.methods import LayerInput, Look, Method, ScoreContext, Watcher, get
from amcli.matching.sample import Sample
from amcli.matching.tiles import Logits


@dataclass(frozen=True)
class Layer:
    """Queries `[H, G, T, d]`, keys `[H, T, d]`, values `[H, T, dv]` of one context."""

    Q: torch.Tensor
    K: torch.Tensor
    V: torch.Tensor
    scale: float = 0.4
    softcap: float | None = None

    @property
    def logits(self) -> Logits:
        return Logits(self.scale, self.softcap)

    @property
    def T(self) -> int:
        return self.K.shape[1]

    def causal(self) -> torch.Tensor:
        """`[H, G, T, T]` float64: what each query pays to each key."""
        H, G, T, _ = self.Q.shape
        P = torch.zeros(H, G, T, T, dtype=torch.float64)
        for h in range(H):
            for g in range(G):
                for i in range(T):
                    s = self.K[h, : i + 1].double() @ self.Q[h, g, i].double() * self.scale
                    if self.softcap is not None:
                        s = self.softcap * torch.tanh(s / self.softcap)
                    P[h, g, i, : i + 1] = s.softmax(0)
        return P


def layer(
    H: int = 2,
    G: int = 3,
    T: int = 40,
    d: int = 8,
    dv: int = 6,
    seed: int = 0,
    **options: float | None,
) -> Layer:
    g = torch.Generator().manual_seed(seed)
    Q, K = torch.randn(H, G, T, d, generator=g) + 0.5, torch.randn(H, T, d, generator=g)
    return Layer(2 * Q, K, torch.randn(H, T, dv, generator=g), **options)  # type: ignore[arg-type]


def watch(x: Layer, watcher: Watcher, cuts: Sequence[int] = (), start: int = 0) -> Watcher:
    """Shows a watcher the context's own queries from `start` on, in pieces."""
    edges = [start, *cuts, x.T]
    for a, b in pairwise(edges):
        look = Look(
            Q=x.Q[:, :, a:b],
            K=x.K,
            limit=torch.arange(a + 1, b + 1),
            fed=None,
            fed_limit=None,
            first=a,
            part=slice(0, x.T),
            logits=x.logits,
            unrotated=x.Q[:, :, a:b],
        )
        watcher.update(look)
    return watcher


def context(x: Layer, watcher: Watcher | None = None, **options: object) -> ScoreContext:
    made = ScoreContext(Sample(x.K[:, :0], None, x.logits), x.K, x.V, watched=watcher)
    return replace(made, **options)  # type: ignore[arg-type]


def kept(method: str | Method, x: Layer, scores: torch.Tensor, t: int) -> list[set[int]]:
    """Positions that a method stores for each head when all of them get `t` entries."""
    method = get(method) if isinstance(method, str) else method
    H = x.K.shape[0]
    sample = Sample(x.K[:, :0], None, x.logits)
    result = compact_layer(method, LayerInput(sample, x.K, x.V, scores, [t] * H))
    assert result.heads.beta is None
    places = result.index.view(H, t)
    for h, (keys, values, _) in enumerate(result.heads.heads()):
        assert torch.equal(keys, x.K[h, places[h].long()])
        assert torch.equal(values, x.V[h, places[h].long()])
    return [set(row) for row in places.tolist()]


def best(scores: torch.Tensor, count: int) -> set[int]:
    """The places of the `count` largest of `scores [T]`, found one after another."""
    left = dict(enumerate(scores.tolist()))
    found = set()
    for _ in range(count):
        place = max(left, key=lambda j: left[j])
        found.add(place)
        del left[place]
    return found
