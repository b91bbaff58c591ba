"""Log-sum-exps, attention outputs and key scores, streamed over tiles.

No pass here holds an `n × T` matrix: memory is a few tiles of `tile` elements whatever the
length of the document and the number of reference queries.
"""

from __future__ import annotations

from typing import Literal

import torch

from .tiles import TILE_ELEMENTS, logits, spans, tile_shape, working_dtype

ScoreKind = Literal["max", "rms", "mean"]
SCORE_KINDS: tuple[ScoreKind, ...] = ("max", "rms", "mean")


def logsumexp(
    Q: torch.Tensor,
    K: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    limit: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    tile: int = TILE_ELEMENTS,
) -> torch.Tensor:
    """Natural log of each query's mass on the keys, `[H, n]`, float32 (float64 for such inputs).

    `limit [n]` (ints): row `i` sees the keys with index `< limit[i]`; None means all of them.
    `bias [H, T]` is added to the logits. A row that sees no key has -inf.
    """
    return _stream(Q, K, None, scale, softcap, limit, bias, tile)[0]


def attention_stats(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    limit: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    tile: int = TILE_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(lse [H, n], Y [H, n, dv])`: log-sum-exp and attention output in one pass.

    Arguments as for `logsumexp`. A row that sees no key has lse -inf and output 0.
    Online softmax: Milakov and Gimelshein, arXiv 1805.02867.
    """
    lse, Y = _stream(Q, K, V, scale, softcap, limit, bias, tile)
    if Y is None:  # only to narrow the type: _stream returns outputs whenever it gets V
        raise ValueError("no values")
    return lse, Y


def _stream(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    limit: torch.Tensor | None,
    bias: torch.Tensor | None,
    tile: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    H, n, _ = Q.shape
    T = K.shape[1]
    dtype = working_dtype(Q, K)
    rows, columns = tile_shape(H, n, T, tile)
    lse = Q.new_empty((H, n), dtype=dtype)
    Y = None if V is None else Q.new_empty((H, n, V.shape[-1]), dtype=dtype)
    for r in spans(n, rows):
        size = r.stop - r.start
        m = Q.new_full((H, size), -torch.inf, dtype=dtype)  # running max
        mass = Q.new_zeros((H, size), dtype=dtype)  # sum of exp(s - m)
        out = None if V is None else Q.new_zeros((H, size, V.shape[-1]), dtype=dtype)
        for c in spans(T, columns):
            S = _visible_logits(Q, K, scale, softcap, limit, bias, r, c)
            m_new = torch.maximum(m, S.amax(-1))
            # A row that has seen nothing yet would subtract -inf from -inf.
            shift = m_new.masked_fill(m_new == -torch.inf, 0.0)
            P = S.sub_(shift.unsqueeze(-1)).exp_()  # [H, rows, columns]
            fade = torch.exp(m - shift)
            mass = mass * fade + P.sum(-1)
            if out is not None and V is not None:
                out = out * fade.unsqueeze(-1) + P @ V[:, c].to(dtype)
            m = m_new
        lse[:, r] = m + mass.log()
        if Y is not None and out is not None:
            Y[:, r] = out / mass.clamp_min(torch.finfo(dtype).tiny).unsqueeze(-1)
    return lse, Y


def _visible_logits(
    Q: torch.Tensor,
    K: torch.Tensor,
    scale: float,
    softcap: float | None,
    limit: torch.Tensor | None,
    bias: torch.Tensor | None,
    r: slice,
    c: slice,
) -> torch.Tensor:
    """Logits of one tile `[H, rows, columns]`, -inf where the row may not see the key."""
    S = logits(Q[:, r], K[:, c], scale, softcap, None if bias is None else bias[:, c])
    if limit is None:
        return S
    position = torch.arange(c.start, c.stop, device=S.device)
    return S.masked_fill_(position >= limit[r].to(S.device).unsqueeze(-1), -torch.inf)


class ScoreState:
    """What the reference queries paid to each key, accumulated over chunks of queries.

    Holds max, sum of squares and sum of `W·P` per key, each `[H, T]`, so that a reference pass
    in chunks stores no queries.
    """

    def __init__(
        self,
        heads: int,
        tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.rows = 0
        self._max = torch.zeros((heads, tokens), device=device, dtype=dtype)
        self._square = torch.zeros_like(self._max)
        self._sum = torch.zeros_like(self._max)

    def update(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        scale: float,
        *,
        softcap: float | None = None,
        weights: torch.Tensor | None = None,
        limit: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        tile: int = TILE_ELEMENTS,
    ) -> torch.Tensor:
        """Add a chunk of queries `Q [H, n, d]` over keys `K [H, T, d]`; returns the lse used.

        `weights [H, n]` is W. Whoever knows the log-sum-exp over *everything* a query sees
        passes it as `lse [H, n]` with no weights: `exp(s - lse)` then is `W·P` already. Left
        out, it is computed over the document's keys (and `limit`).
        """
        H, n, _ = Q.shape
        T = K.shape[1]
        if self._max.shape != (H, T):
            raise ValueError(
                f"scores are kept for {tuple(self._max.shape)} keys, got {H} heads of {T}"
            )
        if lse is None:
            lse = logsumexp(Q, K, scale, softcap=softcap, limit=limit, tile=tile)
        shift = lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)  # [H, n, 1]
        rows, columns = tile_shape(H, n, T, tile)
        for c in spans(T, columns):
            for r in spans(n, rows):
                S = _visible_logits(Q, K, scale, softcap, limit, None, r, c)
                P = S.sub_(shift[:, r]).exp_()  # [H, rows, columns]
                if weights is not None:
                    P = P.mul_(weights[:, r].to(P.dtype).unsqueeze(-1))
                self._max[:, c] = torch.maximum(self._max[:, c], P.amax(1).to(self._max.dtype))
                self._sum[:, c] += P.sum(1)
                self._square[:, c] += P.square_().sum(1)
        self.rows += n
        return lse

    def scores(self, kind: ScoreKind) -> torch.Tensor:
        """`[H, T]`: the largest, root-mean-square or mean probability over all rows so far."""
        rows = max(1, self.rows)
        if kind == "max":
            return self._max.clone()
        if kind == "rms":
            return (self._square / rows).sqrt()
        if kind == "mean":
            return self._sum / rows
        raise ValueError(f"unknown score kind {kind!r}; one of {', '.join(SCORE_KINDS)}")
