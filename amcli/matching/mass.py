"""The mass fit: biases that make the kept keys weigh what the whole document weighed.

`beta = log w` with `w >= 0` minimising `Σ_q W_q² (Σ_j w_j exp(q·k_j·scale - lse_q) - 1)²`: the
relative mass error, so that no query counts for more because its logits are large.
"""

from __future__ import annotations

from math import exp

import torch

from amcli.matching.sample import Queries
from amcli.matching.tiles import (
    MOST,
    TILE_ELEMENTS,
    Logits,
    key_scale,
    normal_equations,
    solve_dtype,
)

BETA_RANGE = (-3.0, 3.0)
"""Bounds of a fitted beta. The lower one keeps every stored key alive, so that its value can
still serve the outputs and no -inf reaches a file or a kernel. The upper one keeps a few keys
from speaking for a whole diffuse head and drowning out live tokens: with e^7, pocket recalls
clearly less than with e^3. Both are those of arXiv 2602.16284."""

DEFAULT_SHRINK = 1e-3
"""Best of 1e-4 to 0.3 in held-out mass and output error over diffuse, mixed and sharp heads."""

_POLISH_RIDGE = 1e-6  # relative to the unit diagonal; above the rounding of a float32 Gram
_STEP_LENGTHS = (1.0, 0.5, 0.2, 0.05)


def nnls(
    G: torch.Tensor,
    b: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    lower: float | torch.Tensor = 0.0,
    upper: float | torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    steps: int = 200,
    polish: int = 8,
) -> torch.Tensor:
    """`argmin ½wᵀGw - bᵀw` with `lower <= w <= upper`, batched and exact: `[B, t]`.

    `G [B, t, t]` symmetric positive semidefinite, `b [B, t]`, `mask [B, t]` (False: padding,
    returned as 0). Accelerated projected gradient with adaptive restart (O'Donoghue and Candès,
    arXiv 1204.3982) on the Gram scaled to unit diagonal, then projected Newton steps
    (Bertsekas 1982) on the free set. The number of steps is fixed, and no step reads the device.
    `start [B, t]` warm-starts; by default the best common weight.
    """
    dtype = solve_dtype(G.device)
    if mask is None:
        mask = torch.ones_like(b, dtype=torch.bool)
    diagonal = G.diagonal(dim1=1, dim2=2)
    real = mask & (diagonal > 0)
    D = torch.where(real, diagonal, torch.ones_like(diagonal)).rsqrt()  # x = w / D
    pair = real.unsqueeze(2) & real.unsqueeze(1)
    Gs = torch.where(pair, G * D.unsqueeze(2) * D.unsqueeze(1), torch.zeros_like(G))
    bs = torch.where(real, b * D, torch.zeros_like(b))
    low = torch.as_tensor(lower, dtype=b.dtype, device=b.device).expand_as(b) / D
    high = torch.full_like(b, torch.inf)
    if upper is not None:
        high = torch.as_tensor(upper, dtype=b.dtype, device=b.device).expand_as(b) / D
    if start is None:
        start = common_weight(G, b, mask).unsqueeze(1).expand_as(b)
    x = torch.minimum(torch.maximum(start / D, low), high)
    x = _accelerated(Gs, bs, low, high, x, steps)
    if polish:
        x = _polish(Gs.to(dtype), bs.to(dtype), low.to(dtype), high.to(dtype), x.to(dtype), polish)
    return torch.where(mask, x.to(b.dtype) * D, torch.zeros_like(b))


def common_weight(G: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The one weight `[B]` that fits best when all keys of a head share it; 1 where undefined."""
    m = mask.to(b.dtype)
    top = (b * m).sum(1)
    bottom = torch.einsum("bi,bij,bj->b", m, G, m)
    return torch.where(bottom > 0, top / bottom.clamp_min(torch.finfo(b.dtype).tiny), 1.0)


def _accelerated(
    G: torch.Tensor,
    b: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    x: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Accelerated projected gradient with gradient-based restart, each problem on its own."""
    rate = 1.0 / _curvature(G)  # [B, 1]
    y, momentum = x, torch.ones_like(rate)
    for _ in range(steps):
        gradient = torch.bmm(G, y.unsqueeze(2)).squeeze(2) - b
        x_new = torch.minimum(torch.maximum(y - rate * gradient, low), high)
        uphill = ((y - x_new) * (x_new - x)).sum(1, keepdim=True) > 0
        grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        push = torch.where(uphill, 0.0, (momentum - 1) / grown)
        momentum = torch.where(uphill, 1.0, grown)
        y = x_new + push * (x_new - x)
        x = x_new
    return x


def _curvature(G: torch.Tensor) -> torch.Tensor:
    """An upper bound `[B, 1]` of the largest eigenvalue.

    `max_i (|G|v)_i / v_i` bounds it for every positive `v` (Collatz and Wielandt); a few power
    iterations make it tight.
    """
    v = torch.ones_like(G[:, :, :1])
    A = G.abs()
    for _ in range(12):
        v = A @ v
        v = (v / v.amax(1, keepdim=True).clamp_min(1e-30)).clamp_min(1e-3)
    return ((A @ v) / v).amax(1).clamp_min(1e-30)


def _polish(
    G: torch.Tensor,
    b: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    x: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Projected Newton: solve on the free set, project, take the best of a few step lengths.

    Never makes the objective worse, so an ill-conditioned solve costs accuracy, not sanity.
    """
    lengths = torch.tensor((*_STEP_LENGTHS, 0.0), dtype=G.dtype, device=G.device)
    lengths = lengths.view(1, -1, 1)
    for _ in range(steps):
        g = torch.bmm(G, x.unsqueeze(2)).squeeze(2) - b
        free = ~(((x <= low) & (g > 0)) | ((x >= high) & (g < 0)))
        both = free.unsqueeze(2) & free.unsqueeze(1)
        N = torch.where(both, G, torch.zeros_like(G))
        N.diagonal(dim1=1, dim2=2).add_(torch.where(free, _POLISH_RIDGE, 1.0))
        L, info = torch.linalg.cholesky_ex(N)
        bad = (info > 0).view(-1, 1, 1)
        L = torch.where(bad, torch.eye(L.shape[1], dtype=L.dtype, device=L.device), L)
        move = torch.cholesky_solve(torch.where(free, -g, 0.0).unsqueeze(2), L).mT  # [B, 1, t]
        trial = x.unsqueeze(1) + lengths * move
        trial = torch.minimum(torch.maximum(trial, low.unsqueeze(1)), high.unsqueeze(1))
        delta = trial - x.unsqueeze(1)  # [B, 5, t]
        change = ((0.5 * (delta @ G) + g.unsqueeze(1)) * delta).sum(2)  # [B, 5]
        best = change.argmin(1).view(-1, 1, 1).expand(-1, 1, x.shape[1])
        x = trial.gather(1, best).squeeze(1)
    return x


def fit_beta(
    queries: Queries,
    logits: Logits,
    C_k: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    rest: torch.Tensor | None = None,
    shrink: float = DEFAULT_SHRINK,
    beta_range: tuple[float, float] = BETA_RANGE,
    tile: int = TILE_ELEMENTS,
) -> torch.Tensor:
    """`beta [H, t]` of the kept keys `C_k [H, t, d]`.

    The keys are to give the queries the mass of the whole document. `rest [H, n]`: log mass of
    further kept keys that stay as they are (beta 0), if any. `mask [H, t]` marks real keys;
    padding gets beta 0. `shrink` pulls the weights towards the best common one, relative to each
    key's own curvature. A key whose best weight is zero ends at the lower bound of `beta_range`.
    With all keys kept, beta is 0 up to rounding.
    """
    if mask is None:
        mask = torch.ones(C_k.shape[:2], dtype=torch.bool, device=C_k.device)
    lse = queries.lse
    W = queries.weights.to(lse)
    missing = torch.ones_like(lse)  # share of the mass that these keys have to provide
    if rest is not None:
        missing = missing - torch.exp((rest - lse).clamp_max(MOST))
    target = (W * missing).unsqueeze(-1)
    G, b = normal_equations(queries.Q, C_k, lse, W, target, logits, mask, tile)
    b = b.squeeze(-1)  # [H, t]
    w0 = common_weight(G, b, mask)
    low, high = exp(beta_range[0]), exp(beta_range[1])
    start = w0.clamp(low, high).unsqueeze(1).expand_as(b)
    prior = shrink * key_scale(G)
    b = b + prior * start
    G.diagonal(dim1=1, dim2=2).add_(prior)
    w = nnls(G, b, mask, lower=low, upper=high, start=start)
    return torch.where(mask, w.clamp(low, high).log(), 0.0)
