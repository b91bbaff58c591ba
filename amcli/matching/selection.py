"""Which keys to keep: the best by score, or orthogonal matching pursuit on softmax rows.

Greedy OMP on a dictionary `A` is a pivoted partial Cholesky of its Gram matrix `AᵀA` whose pivots
are chosen by correlation with the residual target. No least squares is solved inside the loop, only
the chosen columns of `AᵀA` are ever computed, and the order is nested: every smaller budget is a
prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch

from amcli.matching.sample import Queries
from amcli.matching.tiles import TILE_ELEMENTS, Logits, gather_rows, row_size, spans, working_dtype

Target = Literal["joint", "mass"]

PURSUIT = 512
"""Longest pursuit of one head. Its gains come early; the rest of a long head goes to the keys with
the highest scores, which do not depend on which reference queries were sampled."""

SCREENED = 256
"""Most entries of one head that bring candidates: for a longer head, more candidates would not
improve the choice (docs/methods.md)."""

_ROUNDS = 3  # passes over the panels, for heads whose near-duplicates left panels unfilled


@dataclass(frozen=True)
class Selection:
    """Positions kept per head, best first, padded to the longest head.

    index  `[H, t_max]` int64, 0 where padded      mask  `[H, t_max]` bool, True where real
    """

    index: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class OmpSettings:
    """Settings of the pursuit.

    target       what it approximates: "joint" (mass and outputs) or "mass"
    gamma        exponent of the pivot rule: 0 is plain OMP, 0.5 is optimal OLS
    panel        keys chosen exactly among the `4·panel` most promising ones; 1 is exact greedy
    candidates   keys to choose from that each entry of a head adds; see `screened`
    longest      most steps; the rest of a longer head goes to the best scores
    epsilon      near-duplicates of chosen keys, `d_j <= epsilon·G_jj`, are skipped
    projections  number of random projections of the outputs; they depend only on `seed`
    """

    target: Target = "joint"
    gamma: float = 0.375
    panel: int = 16
    candidates: int = 8
    longest: int = PURSUIT
    epsilon: float = 1e-5
    projections: int = 16
    seed: int = 0


@dataclass(frozen=True)
class OmpSelection(Selection):
    """A `Selection` with the error curve of each head.

    residual  `[H, t_max]`: relative squared error of the target after each step, with the
    best unconstrained weights. Keys filled in by score repeat the last value.
    """

    residual: torch.Tensor


def top(scores: torch.Tensor, lengths: Sequence[int]) -> Selection:
    """The `lengths[h]` best keys of each head of `scores [H, T]`; ties to the lower position.

    Raises ValueError when a length is negative or above `T`.
    """
    t_max = _check_lengths(lengths, scores)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return Selection(*_pad(order[:, :t_max], lengths))


def omp(
    queries: Queries,
    logits: Logits,
    K: torch.Tensor,
    scores: torch.Tensor,
    lengths: Sequence[int],
    settings: OmpSettings = OmpSettings(),
    *,
    tile: int = TILE_ELEMENTS,
) -> OmpSelection:
    """Orthogonal matching pursuit on the softmax rows of the reference queries.

    The dictionary is `A = W·exp(q·k·scale - lse)` `[n, T]` over the keys `K [H, T, d]`, screened
    to the `screened(candidates, t)` best keys by `scores [H, T]`, `t` the head's length. The target
    is the mass `W·1`, and for "joint" also random projections of the outputs `W·Y`, scaled to the
    same energy; see `pursuit_target`. A step takes the key of largest `‖B_j‖ / d_j^gamma`: `B` the
    correlations with the residual, `d` the squared norms of the residual columns.

    When candidates run out, the order continues with the best scores left; no key comes twice.
    Memory: one matrix `[H, M, n]` and one `[H, steps, M]`, M the candidates of the longest head.
    Raises ValueError for bad lengths.
    """
    t_max = _check_lengths(lengths, scores)
    H, T = scores.shape
    by_score = scores.sort(dim=1, descending=True, stable=True).indices  # [H, T]
    steps = min(t_max, settings.longest)
    M = min(T, screened(settings.candidates, steps))
    if t_max == 0:
        index, mask = _pad(by_score[:, :0], lengths)
        return OmpSelection(index, mask, queries.lse.new_zeros((H, 0)))
    F = pursuit_target(queries, settings)  # [H, n, 1 + r]
    C = gather_rows(K, by_score[:, :M])  # [H, M, d]
    A = _dictionary(queries, logits, C, tile)
    energy = F.square().sum((1, 2))  # [H]
    # Each head gets as many candidates as if it were alone.
    most = [screened(settings.candidates, min(t, settings.longest)) for t in lengths]
    reach = torch.tensor(most, device=A.device)
    usable = torch.arange(M, device=A.device) < reach.unsqueeze(1)
    pursuit = _Pursuit(A, A @ F.to(A.dtype), settings, usable)
    chosen, alive, gain = pursuit.run(min(steps, M))
    order = _complete(chosen, alive, by_score)[:, :t_max]
    curve = 1.0 - gain.cumsum(1) / energy.clamp_min(torch.finfo(gain.dtype).tiny).unsqueeze(1)
    curve = curve.clamp_(0.0, 1.0)[:, :t_max]
    if curve.shape[1] < t_max:  # the tail came from scores alone
        curve = torch.cat([curve, curve[:, -1:].expand(-1, t_max - curve.shape[1])], dim=1)
    index, mask = _pad(order, lengths)
    return OmpSelection(index, mask, curve)


def screened(candidates: int, t: int) -> int:
    """How many keys a head of `t` entries chooses from, if it has that many."""
    return max(1, candidates) * min(t, SCREENED)


def pursuit_target(queries: Queries, settings: OmpSettings) -> torch.Tensor:
    """What OMP approximates: `W·[1, Y·R]` `[H, n, 1 + r]`, both parts of equal energy per head.

    `R [dv, r]` is Gaussian and depends only on the seed, `r` the number of projections; "mass" is
    only the first column.
    """
    W, Y = queries.weights, queries.Y
    mass = W.unsqueeze(-1)
    if settings.target == "mass":
        return mass
    # Drawn on the CPU: the same on every device.
    generator = torch.Generator().manual_seed(settings.seed)
    R = torch.randn(Y.shape[-1], settings.projections, generator=generator, dtype=torch.float64)
    outputs = mass * (Y.to(W.dtype) @ R.to(W.dtype).to(W.device))  # [H, n, r]
    energy = outputs.square().sum((1, 2), keepdim=True)
    share = mass.square().sum((1, 2), keepdim=True)
    outputs = outputs * (share / energy.clamp_min(torch.finfo(W.dtype).tiny)).sqrt()
    return torch.cat([mass, outputs], dim=-1)


def _dictionary(queries: Queries, logits: Logits, C: torch.Tensor, tile: int) -> torch.Tensor:
    """`W·exp(q·c·scale - lse)` of keys `C [H, M, d]`: `[H, M, n]`, one row per key, so that a few
    keys are a few rows."""
    Q = queries.Q
    (H, M, _), n = C.shape, Q.shape[1]
    dtype = working_dtype(Q, C)
    A = Q.new_empty((H, M, n), dtype=dtype)
    shift, W = (x.to(dtype).unsqueeze(1) for x in (queries.lse, queries.weights))
    for r in spans(M, row_size(M, H * n, tile)):
        A[:, r] = logits(C[:, r], Q).sub_(shift).exp_().mul_(W)
    return A


class _Pursuit:
    """The state of the pivoted Cholesky, all heads at once.

    A `[H, M, n]` the dictionary, one row per key, Z `[H, steps, M]` rows of the factor, d `[H, M]`
    remaining squared norms, B `[H, M, c]` remaining correlations, floor `[H, M]` the d below which
    a key is skipped (inf: taken).
    """

    def __init__(
        self, A: torch.Tensor, B: torch.Tensor, settings: OmpSettings, usable: torch.Tensor
    ) -> None:
        self.A, self.B = A, B
        self.gamma, self.panel = settings.gamma, settings.panel
        self.d = torch.linalg.vector_norm(A, dim=2).square()
        self.floor = (settings.epsilon * self.d).masked_fill(~usable, torch.inf)
        self.Z = A.new_zeros((A.shape[0], 0, A.shape[1]))
        self.head = torch.arange(A.shape[0], device=A.device).unsqueeze(1)
        self.filled = 0

    def run(self, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(chosen, alive, gain)`, each `[H, >= steps]`: candidates in order of choice.

        Slots with no usable pivot are not `alive` and stand at the end; `gain` is the drop of
        the squared residual.
        """
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        missing = steps
        for _ in range(_ROUNDS):
            panels = ceil(missing / self.panel)
            room = self.Z.new_zeros((self.Z.shape[0], panels * self.panel, self.Z.shape[2]))
            self.Z = torch.cat([self.Z, room], dim=1)
            parts += [self._step() for _ in range(panels)]
            done = torch.cat([alive for _, alive, _ in parts], dim=1).sum(1)  # [H]
            short = (steps - done).clamp_min(0) * (self.d > self.floor).any(1)
            missing = int(short.max())  # the only wait for the device, once per round
            if missing == 0:
                break
        chosen, alive, gain = (torch.cat(list(p), dim=1) for p in zip(*parts, strict=True))
        front = alive.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
        return chosen.gather(1, front), alive.gather(1, front), gain.gather(1, front)

    def _value(self, B: torch.Tensor, d: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        """The pivot rule `‖B_j‖ / d_j^gamma`, -1 for keys that may not be taken."""
        rule: torch.Tensor = B.norm(dim=-1) / d.clamp_min(1e-30).pow(self.gamma)
        return rule.masked_fill(d <= floor, -1.0)

    def _step(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose one panel and update `Z, d, B`; `(chosen, alive, gain)` `[H, b]`."""
        b, k = self.panel, self.filled
        width = min(4 * b, self.A.shape[1])
        cand = self._value(self.B, self.d, self.floor).topk(width, dim=1).indices  # [H, 4b]
        Z = self.Z[:, :k]
        Zc = Z.gather(2, cand.unsqueeze(1).expand(-1, k, -1))  # [H, k, 4b]
        Ac = gather_rows(self.A, cand)  # [H, 4b, n]
        S = torch.baddbmm(Ac @ Ac.mT, Zc.mT, Zc, alpha=-1.0)  # [H, 4b, 4b]
        local, alive, rows, coef = self._choose(
            S, self.B[self.head, cand], self.floor[self.head, cand]
        )
        # L[i, j] = row j of the factor at pivot i; a dead slot gets a unit row, without effect.
        L = rows.gather(2, local.unsqueeze(1).expand(-1, b, -1)).mT.tril()
        L = torch.where(alive.unsqueeze(2), L, torch.zeros_like(L))
        L = L + torch.diag_embed((~alive).to(L.dtype))
        chosen = cand.gather(1, local)  # [H, b]
        R = gather_rows(Ac, local) @ self.A.mT  # [H, b, M]
        Zs = Z.gather(2, chosen.unsqueeze(1).expand(-1, k, -1))
        R = torch.baddbmm(R, Zs.mT, Z, alpha=-1.0)
        R = torch.where(alive.unsqueeze(2), R, torch.zeros_like(R))
        new = torch.linalg.solve_triangular(L, R, upper=False)  # [H, b, M]
        self.Z[:, k : k + b] = new
        self.filled = k + b
        self.d -= new.square().sum(1)
        self.B.baddbmm_(new.mT, coef, alpha=-1.0)
        taken = torch.zeros_like(self.d).scatter_add_(1, chosen, alive.to(self.d.dtype))
        self.floor = self.floor.masked_fill(taken > 0, torch.inf)
        return chosen, alive, coef.square().sum(-1)

    def _choose(
        self, S: torch.Tensor, B: torch.Tensor, floor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Exact greedy pivots inside one panel's candidates.

        S `[H, c, c]` residual Gram, B `[H, c, r]`, floor `[H, c]`. Returns local pivots and
        alive `[H, b]`, factor rows `[H, b, c]`, coefficients of the target `[H, b, r]`.
        """
        d = S.diagonal(dim1=1, dim2=2).clone()
        local, alive, rows, coef = [], [], [], []
        for _ in range(self.panel):
            j = self._value(B, d, floor).argmax(1, keepdim=True)  # [H, 1]
            ok = d.gather(1, j) > floor.gather(1, j)
            root = torch.where(ok, d.gather(1, j), torch.ones_like(S[:, :1, 0])).sqrt()
            z = torch.where(ok, S[self.head, j].squeeze(1) / root, torch.zeros_like(d))
            y = B[self.head, j].squeeze(1) / root
            y = torch.where(ok, y, torch.zeros_like(y))  # [H, r]
            S = S - z.unsqueeze(2) * z.unsqueeze(1)
            B = B - z.unsqueeze(2) * y.unsqueeze(1)
            d = d - z.square()
            floor = floor.scatter(1, j, torch.inf)
            local.append(j)
            alive.append(ok)
            rows.append(z)
            coef.append(y)
        return torch.cat(local, 1), torch.cat(alive, 1), torch.stack(rows, 1), torch.stack(coef, 1)


def _complete(chosen: torch.Tensor, alive: torch.Tensor, by_score: torch.Tensor) -> torch.Tensor:
    """A full order `[H, T]`: the pursuit's choices, then everything else by score.

    `chosen` holds ranks by score (the candidates are the best ones, in order).
    """
    H, T = by_score.shape
    rank = torch.arange(T + 1, device=by_score.device).expand(H, -1)
    priority = rank + chosen.shape[1]
    step = torch.arange(chosen.shape[1], device=by_score.device).expand(H, -1)
    slot = torch.where(alive, chosen, torch.full_like(chosen, T))  # column T is discarded
    priority = priority.scatter(1, slot, step)[:, :T]
    return by_score.gather(1, priority.argsort(dim=1))


def _check_lengths(lengths: Sequence[int], scores: torch.Tensor) -> int:
    H, T = scores.shape
    if len(lengths) != H or any(not 0 <= t <= T for t in lengths):
        raise ValueError(f"lengths {list(lengths)} do not fit {H} heads of {T} keys")
    return max(lengths, default=0)


def _pad(order: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(index, mask)` of the first `lengths[h]` of each row of `order [H, t_max]`."""
    t = torch.tensor(list(lengths), device=order.device).unsqueeze(1)
    mask = torch.arange(order.shape[1], device=order.device) < t
    return order.masked_fill(~mask, 0), mask
