"""Attention Matching with orthogonal matching pursuit, as its paper has it.

Zweiger et al., arXiv 2602.16284, algorithm 1. Greedy pursuit on the masses alone: the next key
is the one whose column of `Φ` has the largest product with the residual, `argmax_j rᵀΦ_j`;
then all weights are solved again by least squares and clamped to [1e-12, e⁷], and
`r = m - Φ_S w`. Once the budget is full, keys whose beta is under -7 are dropped for good and
replaced, at most three times. Values by least squares; see `least_squares`.

`am-omp` is the paper's fast variant: four keys per step, weights at every second step. Between
two solves the residual does not change, so each solve takes the eight best columns.

Not as in the paper: queries are those of the uncompacted model (the paper's are "on-policy":
layers below are compacted already) and of the repetition alone (the paper adds self-study).
"""

from __future__ import annotations

from functools import partial
from math import exp

import torch

from amcli.matching.baselines.least_squares import fit_layer, least_squares
from amcli.matching.methods import Method
from amcli.matching.sample import Queries
from amcli.matching.tiles import (
    TILE_ELEMENTS,
    Logits,
    gather_rows,
    row_size,
    solve_dtype,
    spans,
    working_dtype,
)

WEIGHT_RANGE = (1e-12, exp(7.0))
DROP_BELOW = -7.0
REFILLS = 3

PHI_ELEMENTS = 1 << 28
"""Most elements of Φ at a time (1 GiB in float32): heads are grouped to stay below it, and a single
head that would exceed it uses evenly spaced ones of its reference queries."""


class Pursuit:
    """Greedy selection of `t` rows of `Φᵀ [B, T, n]` for the target `m [B, n]`, heads at once.

    Slots may be empty: `slots [B, t + 1]` holds the chosen keys, `used` says which are real, and
    only the first `size` were ever filled. The last slot never counts; it receives what a head
    has no room for. `rows`, `G` and `b` are `Φ_Sᵀ`, `Φ_SᵀΦ_S` and `Φ_Sᵀm`.
    """

    def __init__(self, Phi: torch.Tensor, m: torch.Tensor, t: int):
        B, T, n = Phi.shape
        self.Phi, self.t, self.size = Phi, t, 0
        exact = solve_dtype(Phi.device)
        self.m = m.to(exact)
        self.slots = torch.zeros((B, t + 1), dtype=torch.int64, device=Phi.device)
        self.used = torch.zeros((B, t + 1), dtype=torch.bool, device=Phi.device)
        self.rows = torch.zeros((B, t + 1, n), dtype=exact, device=Phi.device)
        self.G = torch.zeros((B, t + 1, t + 1), dtype=exact, device=Phi.device)
        self.b = torch.zeros((B, t + 1), dtype=exact, device=Phi.device)
        self.w = torch.zeros((B, t + 1), dtype=exact, device=Phi.device)
        self.taken = torch.zeros((B, T), dtype=torch.bool, device=Phi.device)
        self.dropped = torch.zeros((B, T), dtype=torch.bool, device=Phi.device)

    def run(self, keys_a_solve: int, refills: int = REFILLS) -> tuple[torch.Tensor, torch.Tensor]:
        """`(index [B, t], w [B, t])`."""
        self._fill(keys_a_solve)
        for _ in range(refills):
            if not self._drop():
                break
            self._fill(keys_a_solve)
        return self.slots[:, : self.t], self.w[:, : self.t]

    def _fill(self, keys_a_solve: int) -> None:
        """Take keys, `keys_a_solve` at a time, until no slot is empty."""
        while not bool(self.used[:, : self.t].all()):
            now = slice(0, self.size)
            r = self.m - (self.w[:, now].unsqueeze(1) @ self.rows[:, now]).squeeze(1)  # [B, n]
            # Row times matrix: on a CPU ten times as fast as matrix times column.
            product = (r.to(self.Phi.dtype).unsqueeze(1) @ self.Phi.mT).squeeze(1)  # [B, T]
            # Dropped keys come back only when nothing else is left.
            product = product.masked_fill(self.dropped, -torch.finfo(product.dtype).max)
            product = product.masked_fill(self.taken, -torch.inf)
            self._take(product.topk(min(keys_a_solve, self.t), dim=1).indices)
            self._solve()

    def _solve(self) -> None:
        now = slice(0, self.size)
        used = self.used[:, now]
        w = least_squares(self.G[:, now, now], self.b[:, now], used).clamp(*WEIGHT_RANGE)
        self.w[:, now] = torch.where(used, w, torch.zeros_like(w))

    def _drop(self) -> bool:
        """Empty the slots whose beta is too low; False when there is none."""
        low = self.used & (self.w < exp(DROP_BELOW))
        if not bool(low.any()):
            return False
        gone = torch.zeros_like(self.taken, dtype=torch.int8)
        gone.scatter_add_(1, self.slots, low.to(torch.int8))
        self.dropped |= gone > 0
        self.taken &= gone == 0
        self.used &= ~low
        kept = self.used.to(self.G.dtype)
        self.rows *= kept.unsqueeze(2)
        self.G *= kept.unsqueeze(1) * kept.unsqueeze(2)
        self.b *= kept
        self._solve()
        return True

    def _take(self, picked: torch.Tensor) -> None:
        """Put the keys `picked [B, k]` into the first empty slots, as far as there are any."""
        k = picked.shape[1]
        empty = ~self.used[:, : self.t]
        order = empty.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :k]
        fits = empty.gather(1, order)
        slot = torch.where(fits, order, torch.full_like(order, self.t))  # [B, k]
        self.size = min(self.t, self.size + k)
        self.slots.scatter_(1, slot, picked)
        self.used.scatter_(1, slot, fits)
        marked = torch.zeros_like(self.taken, dtype=torch.int8)
        self.taken |= marked.scatter_add_(1, picked, fits.to(torch.int8)) > 0
        new = gather_rows(self.Phi, picked).to(self.rows.dtype)
        new = torch.where(fits.unsqueeze(2), new, torch.zeros_like(new))  # [B, k, n]
        self.rows.scatter_(1, slot.unsqueeze(2).expand_as(new), new)
        cross = self.rows[:, : self.size] @ new.mT  # [B, size, k]
        self.G[:, : self.size].scatter_(2, slot.unsqueeze(1).expand_as(cross), cross)
        self.G[:, :, : self.size].scatter_(1, slot.unsqueeze(2).expand_as(cross.mT), cross.mT)
        self.b.scatter_(1, slot, (new @ self.m.unsqueeze(2)).squeeze(2))


def features(Q: torch.Tensor, K: torch.Tensor, logits: Logits) -> tuple[torch.Tensor, torch.Tensor]:
    """`(Φᵀ [B, T, n], m [B, n])`: masses relative to each query's largest, and their sums."""
    B, n, _ = Q.shape
    T = K.shape[1]
    Phi = torch.empty((B, T, n), dtype=working_dtype(Q, K), device=Q.device)
    for r in spans(n, row_size(n, B * T, TILE_ELEMENTS)):
        S = logits(Q[:, r], K)
        Phi[:, :, r] = S.sub_(S.amax(-1, keepdim=True)).exp_().mT
    return Phi, Phi.sum(1)


def weigh(
    queries: Queries,
    logits: Logits,
    K: torch.Tensor,
    scores: torch.Tensor,
    t: int,
    *,
    keys_a_solve: int = 8,
    phi_elements: int = PHI_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(index [B, t], beta [B, t])` by the paper's pursuit; uses only Q of the queries, and ignores
    `scores`."""
    T = K.shape[1]
    n = min(queries.count, max(1, phi_elements // T))
    Q = queries.Q[:, torch.linspace(0, queries.count - 1, n, device=K.device).round().long()]
    index, beta = [], []
    for group in spans(Q.shape[0], max(1, phi_elements // (n * T))):
        Phi, m = features(Q[group], K[group], logits)
        chosen, w = Pursuit(Phi, m, t).run(keys_a_solve)
        index.append(chosen)
        beta.append(w.log())
    return torch.cat(index), torch.cat(beta)


AM_OMP = Method(
    name="am-omp",
    mass="nnls",
    values="least-squares",
    target="mass",
    budget="uniform",
    fit=partial(fit_layer, weigh),
)
