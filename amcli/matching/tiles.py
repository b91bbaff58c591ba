"""Logits, and the shapes of the tiles in which every streaming pass runs.

The one place that knows how a logit is made: `softcap` acts on the scaled product, before the
bias, as in the models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import torch

TILE_ELEMENTS = 1 << 22
"""Elements of the largest temporary of a streaming pass (16 MiB in float32); a pass holds a few
of them at a time. Four times as many make CPUs slower, because the system allocates such memory
afresh each time. Every function that streams takes `tile` to override it."""

CACHED_ELEMENTS = 1 << 19
"""The same on a CPU, for passes that go over their temporary several times: 2 MiB stay in its
caches, which makes it half as fast again."""

GPU_TILE_ELEMENTS = 1 << 27
"""The same on a GPU (512 MiB), where launches are what costs."""

_ROOM = 2 << 30
_SHARE = 0.4  # of the memory that is free on a GPU


@dataclass(frozen=True)
class Room:
    """Memory that a computation may take besides its inputs and results.

    tile   elements of the largest temporary of a streaming pass
    bytes  what a group of heads processed together may hold
    """

    tile: int
    bytes: int


def room_on(device: torch.device, limit: int | None = None) -> Room:
    """The room on a device: `limit` bytes in all; None: what suits a CPU, or is free on a GPU."""
    if device.type == "cpu":
        return Room(TILE_ELEMENTS, limit or _ROOM)
    if limit is None:
        limit = _ROOM
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            limit = int(_SHARE * (free + idle))
    # A pass holds up to four float32 temporaries of this size.
    return Room(max(TILE_ELEMENTS, min(GPU_TILE_ELEMENTS, limit // 64)), limit)


def working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype the maths runs in: float32, or float64 if an input already is."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def solve_dtype(device: torch.device) -> torch.dtype:
    """The dtype of t×t factorisations: float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def spans(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(total)`."""
    for start in range(0, total, max(1, size)):
        yield slice(start, min(total, start + size))


def row_size(n: int, columns: int, tile: int) -> int:
    """Rows of a tile with `columns` elements per row."""
    return max(1, min(n, tile // max(1, columns)))


def tile_shape(
    H: int, n: int, T: int, tile: int, device: torch.device | None = None
) -> tuple[int, int]:
    """`(rows, columns)` with `H * rows * columns <= tile` (and at least 1×1); smaller on a CPU."""
    if device is None or device.type == "cpu":
        tile = min(tile, CACHED_ELEMENTS)
    per_head = max(1, tile // max(1, H))
    rows = max(1, min(n, isqrt(per_head)))
    columns = max(1, min(T, per_head // rows))
    return max(1, min(n, per_head // columns)), columns


@dataclass(frozen=True)
class Logits:
    """How a model makes its logits.

    scale    factor of the products of queries and keys
    softcap  `s -> softcap * tanh(s / softcap)` on the scaled product, before the bias; None: none
    """

    scale: float
    softcap: float | None = None

    def __call__(
        self, Q: torch.Tensor, K: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`softcap(q·k·scale) + bias`, `[H, n, T]`, float32 or float64.

        `Q [H, n, d]`, `K [H, T, d]`, `bias [H, T]` or None (beta; -inf hides a key).
        """
        dtype = working_dtype(Q, K)
        S = torch.matmul(Q.to(dtype) * self.scale, K.to(dtype).mT)  # [H, n, T]
        if self.softcap is not None:
            S = S.div_(self.softcap).tanh_().mul_(self.softcap)
        return S if bias is None else S.add_(bias.to(dtype).unsqueeze(-2))


def hide(beta: torch.Tensor | None, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bias `[H, t]` of padded entries: beta (0 for None) where `mask`, -inf elsewhere."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    if beta is not None:
        bias = beta.to(dtype)
    return bias.masked_fill(~mask, -torch.inf)


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index [H, t]` of `x [H, T, c]`: `[H, t, c]`."""
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


MOST = 12.0
"""Logarithm of the largest mass one entry may have, relative to that of the whole document. A key
of the document has at most 1; a rounded key may have e^100, from which nothing finite could be
solved. Far above what any fit reaches, so that such an entry still gets the least weight."""


def normal_equations(
    Q: torch.Tensor,
    C: torch.Tensor,
    shift: torch.Tensor,
    W: torch.Tensor,
    F: torch.Tensor,
    logits: Logits,
    mask: torch.Tensor | None,
    tile: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(AᵀA [H, t, t], AᵀF [H, t, c])` for `A = W·exp(q·c·scale - shift)`, streamed over rows.

    `Q [H, n, d]`, `C [H, t, d]` keys, `shift, W [H, n]`, `F [H, n, c]`, `mask [H, t]` (False: a
    zero column). Exponents are capped at `MOST`.
    """
    H, n, _ = Q.shape
    t = C.shape[1]
    dtype = working_dtype(Q, C)
    G = Q.new_zeros((H, t, t), dtype=dtype)
    B = Q.new_zeros((H, t, F.shape[-1]), dtype=dtype)
    bias = None if mask is None else hide(None, mask, dtype)
    for r in spans(n, row_size(n, H * t, tile)):
        A = logits(Q[:, r], C, bias).sub_(shift[:, r].unsqueeze(-1))
        A = A.clamp_max_(MOST).exp_()
        A = A.mul_(W[:, r].to(dtype).unsqueeze(-1))  # [H, rows, t]
        G.baddbmm_(A.mT, A)
        B.baddbmm_(A.mT, F[:, r].to(dtype))
    return G, B


def key_scale(G: torch.Tensor) -> torch.Tensor:
    """The scale of a ridge, `[H, t]`, positive: `diag G` plus 1% of its mean.

    Relative to `diag G` alone, a key that the reference queries hardly look at could take any
    weight or value that explains their noise, and would fail at the first query that does look.
    Relative to the mean alone, the sink would set the scale for all keys.
    """
    diagonal = G.diagonal(dim1=1, dim2=2)
    count = (diagonal > 0).sum(1, keepdim=True).clamp_min(1)  # padding has zero columns
    floor = 0.01 * diagonal.sum(1, keepdim=True) / count
    return (diagonal + floor).clamp_min(torch.finfo(G.dtype).tiny)
