"""Small attention heads that look like trained ones: RoPE keys, a sink, near-duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from amcli.matching.sample import Queries, Sample
from amcli.matching.tiles import Logits

# How strongly a query singles out the keys it is about, and how much it pays to the sink.
REGIMES = {"diffuse": (0.5, 1.0), "mixed": (1.6, 1.5), "sharp": (3.5, 2.0)}


@dataclass(frozen=True)
class Heads:
    """`K [H, T, d]`, `V [H, T, dv]`, reference and held-out queries `[H, n, d]`, `W [H, n]`."""

    K: torch.Tensor
    V: torch.Tensor
    Q: torch.Tensor
    Q_new: torch.Tensor
    W: torch.Tensor
    scale: float

    @property
    def logits(self) -> Logits:
        return Logits(self.scale)

    @property
    def sample(self) -> Sample:
        return Sample(self.Q, self.W, self.logits)

    def asked(
        self, weighted: bool = True, logits: Logits | None = None, Q: torch.Tensor | None = None
    ) -> Queries:
        """The reference queries, or others, with what the document gives them."""
        return Queries.over(
            self.Q if Q is None else Q, self.W if weighted else None, self.K, self.V,
            logits or self.logits,
        )  # fmt: skip


def rope(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels of `x [..., n, d]` by `position [n]`."""
    half = x.shape[-1] // 2
    angle = position.unsqueeze(-1) * 1e4 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


def heads(
    regime: str = "mixed",
    H: int = 2,
    T: int = 160,
    n: int = 192,
    d: int = 16,
    dv: int = 12,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Heads:
    """Heads of one regime: "diffuse", "mixed" or "sharp"."""
    strength, sink = REGIMES[regime]
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    topics = normal(H, 12, d)
    about = torch.randint(12, (H, T), generator=g)
    content = torch.gather(topics, 1, about.unsqueeze(-1).expand(-1, -1, d))
    content = content + 0.6 * normal(H, T, d)
    copies = torch.arange(5, T, 7)  # every seventh key nearly repeats its neighbour
    content[:, copies] = content[:, copies - 1] + 0.01 * normal(H, len(copies), d)
    position = torch.arange(T, dtype=torch.float64)
    K = rope(content, 0.2 * position)
    always = normal(H, 1, d)
    K[:, :1] = 2.0 * always  # the sink
    V = 0.5 * torch.gather(normal(H, 12, dv), 1, about.unsqueeze(-1).expand(-1, -1, dv))
    V = V + normal(H, T, dv)
    V[:, 0] *= 0.05

    # A few keys are asked for often, most hardly ever (Zipf), at random places.
    often = (1 + torch.rand(H, T, generator=g).argsort(1).double()) ** -1.2
    often[:, 0] = 0.0

    def queries(rows: int) -> torch.Tensor:
        picked = torch.multinomial(often, rows, replacement=True, generator=g)
        wanted = torch.gather(K, 1, picked.unsqueeze(-1).expand(-1, -1, d))
        return strength * (wanted + 0.5 * normal(H, rows, d)) + sink * always

    W = 0.3 + 0.7 * torch.rand(H, n, generator=g, dtype=torch.float64)
    K, V, Q, Q_new, W = (x.to(dtype) for x in (K, V, queries(n), queries(n), W))
    return Heads(K, V, Q, Q_new, W, scale=1 / sqrt(d))
