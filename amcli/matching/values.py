"""The value fit: values that reproduce the document's outputs through the kept keys.

`C_v = (XᵀX + Λ)⁻¹(XᵀY + ΛV_S)` with `Λ = λ·diag(XᵀX)` (and a little for keys that no reference
query looks at, see `key_scale`): least squares shrunk to the original values `V_S`. Plain least
squares can overfit the reference queries, and no fixed λ wins on every head, so λ is chosen per
head on reference queries that the fit did not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isinf
from typing import Literal

import torch

from amcli.matching.sample import Queries
from amcli.matching.scores import Stats
from amcli.matching.tiles import (
    TILE_ELEMENTS,
    Logits,
    hide,
    key_scale,
    row_size,
    solve_dtype,
    spans,
    working_dtype,
)

HeldOut = Literal["held-out"]

LAMBDAS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, inf)
"""The λ tried on held-out queries, from nearly free to the original values."""

SLACK = 0.02
"""Of all λ whose squared held-out error is within this share of the best, the largest is taken:
where the reference queries show a tie, values closer to the originals win."""

_SAFE_RIDGE = 1e-3  # on a unit diagonal: always positive definite, despite float32 rounding
_FOLDS = 2
_BLOCK = 64  # rows that stay together in a fold: neighbours are too alike to be held out singly


def fit_values(
    queries: Queries,
    logits: Logits,
    C_k: torch.Tensor,
    beta: torch.Tensor | None,
    V_S: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    rest: Stats | None = None,
    lam: float | HeldOut | None = "held-out",
    tile: int = TILE_ELEMENTS,
) -> torch.Tensor:
    """`C_v [H, t, dv]`, in the dtype of `V_S`.

    `X [n, t]`: softmax rows over the kept keys `C_k [H, t, d]` with `beta [H, t]` (and `rest`);
    `Y`: the queries' outputs over the whole document; `V_S [H, t, dv]`: the kept keys' own
    values. A query's squared error counts by its weight `W`. `lam`: a number is λ itself (0 is
    least squares, inf the original values), None keeps the original values without a solve,
    "held-out" chooses from LAMBDAS per head over two interleaved folds of the queries, then
    refits on all of them. `mask [H, t]` marks real keys; padding gets value 0.
    """
    if mask is None:
        mask = torch.ones(C_k.shape[:2], dtype=torch.bool, device=C_k.device)
    Q = queries.Q
    V = V_S.to(working_dtype(Q, V_S)).masked_fill(~mask.unsqueeze(-1), 0.0)
    if lam is not None and not (isinstance(lam, float | int) and isinf(lam)):
        fit = _accumulate(queries, logits, C_k, beta, V, mask, rest, tile)
        if lam == "held-out":
            shrink = _choose(fit)  # [H]
        else:
            shrink = torch.full((Q.shape[0],), float(lam), device=Q.device)
        G, dtype = fit.G.sum(0), solve_dtype(Q.device)
        delta = _solve(G, fit.E.sum(0), shrink, key_scale(G), dtype, fallible=lam != "held-out")
        V = V + delta.to(V.dtype)
    return V.to(V_S.dtype)


@dataclass(frozen=True)
class _Fit:
    """Sums over the rows of each fold `f`, for corrections `δ = C_v - V_S`.

    G `[f, H, t, t]` XᵀX, E `[f, H, t, dv]` Xᵀ(Y - X·V_S), c `[H]` ‖Y - X·V_S‖² over all folds.
    """

    G: torch.Tensor
    E: torch.Tensor
    c: torch.Tensor


def _accumulate(
    queries: Queries,
    logits: Logits,
    C_k: torch.Tensor,
    beta: torch.Tensor | None,
    V: torch.Tensor,
    mask: torch.Tensor,
    rest: Stats | None,
    tile: int,
) -> _Fit:
    """One pass over the queries: the normal equations of each fold."""
    Q, W, Y = queries.Q, queries.weights, queries.Y
    H, n, _ = Q.shape
    t, dv = V.shape[1:]
    dtype = working_dtype(Q, C_k)
    bias = hide(beta, mask, dtype)
    G = Q.new_zeros((_FOLDS, H, t, t), dtype=dtype)
    E = Q.new_zeros((_FOLDS, H, t, dv), dtype=dtype)
    c = Q.new_zeros(H, dtype=dtype)
    fold_of = torch.arange(n) // max(1, min(_BLOCK, n // 8)) % _FOLDS
    for fold in range(_FOLDS):
        rows = (fold_of == fold).nonzero().squeeze(1).to(Q.device)
        for part in spans(len(rows), row_size(n, H * t, tile)):
            r = rows[part]
            S = logits(Q[:, r], C_k, bias)  # [H, rows, t]
            m = S.amax(-1, keepdim=True)
            X = S.sub_(m).exp_()
            mass = X.sum(-1, keepdim=True)
            error = Y[:, r].to(dtype)  # [H, rows, dv]
            share = torch.ones_like(mass)
            if rest is not None:
                share = torch.sigmoid(m + mass.log() - rest.lse[:, r].to(dtype).unsqueeze(-1))
                error = error - rest.Y[:, r].to(dtype) * (1 - share)
            X = X.mul_(share / mass)
            error = error - X @ V.to(dtype)
            root = W[:, r].to(dtype).sqrt().unsqueeze(-1)
            X, error = X.mul_(root), error * root
            G[fold].baddbmm_(X.mT, X)
            E[fold].baddbmm_(X.mT, error)
            c += error.square().sum((1, 2))
    return _Fit(G, E, c)


def _choose(fit: _Fit) -> torch.Tensor:
    """The λ of each head `[H]` by its squared error on the folds that did not fit it.

    A correction δ changes the held-out squared error by `tr(δᵀGδ) - 2tr(δᵀE)`; the original
    values do not change it. The scale of the ridge comes from all folds: a key that only the
    held-out queries look at should be left alone by the fit, not blown up. Computed in the dtype
    of the sums: float32 can solve with every λ here, and the actual fit comes later.
    """
    H, dtype = fit.G.shape[1], fit.G.dtype
    scale = key_scale(fit.G.sum(0))
    change = torch.zeros((len(LAMBDAS), H), dtype=dtype, device=fit.G.device)
    for held in range(_FOLDS):
        others = [f for f in range(_FOLDS) if f != held]
        G, E = fit.G[others].sum(0), fit.E[others].sum(0)
        G_held, E_held = fit.G[held], fit.E[held]
        share = (_FOLDS - 1) / _FOLDS  # of the queries, so of the scale
        for i, lam in enumerate(LAMBDAS[:-1]):
            delta = _solve(G, E, torch.full((H,), lam, device=G.device), share * scale, dtype)
            change[i] += ((G_held @ delta - 2 * E_held) * delta).sum((1, 2))
    wrong = fit.c + change  # the last row is the original values
    near = wrong <= wrong.amin(0) + SLACK * wrong.amin(0).clamp_min(0.0)
    index = torch.arange(len(LAMBDAS), device=near.device).unsqueeze(1)
    chosen = torch.where(near, index, -1).amax(0)
    return torch.tensor(LAMBDAS, dtype=dtype, device=near.device)[chosen]


def _solve(
    G: torch.Tensor,
    E: torch.Tensor,
    lam: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    fallible: bool = False,
) -> torch.Tensor:
    """`δ = (G + λ·diag(scale))⁻¹E` `[H, t, dv]`, equilibrated by `scale`; 0 where λ is inf.

    `fallible`: λ may be near 0, where near-duplicate keys make the factorisation fail; heads
    where it fails get the safe ridge. Both are computed up front, so no decision waits for the
    device.
    """
    D = scale.to(dtype).rsqrt()  # [H, t]
    scaled = G.to(dtype) * D.unsqueeze(2) * D.unsqueeze(1)
    keep = torch.isinf(lam).to(scaled.device)
    ridge = torch.where(keep, 1.0, lam.to(device=scaled.device, dtype=dtype)).unsqueeze(1)
    scaled.diagonal(dim1=1, dim2=2).add_(ridge)
    L, info = torch.linalg.cholesky_ex(scaled)
    if fallible:
        scaled.diagonal(dim1=1, dim2=2).add_((_SAFE_RIDGE - ridge).clamp_min(0.0))
        safe, _ = torch.linalg.cholesky_ex(scaled)
        L = torch.where((info > 0).view(-1, 1, 1), safe, L)
    delta = torch.cholesky_solve(D.unsqueeze(2) * E.to(dtype), L) * D.unsqueeze(2)
    return torch.where(keep.view(-1, 1, 1), torch.zeros_like(delta), delta)
