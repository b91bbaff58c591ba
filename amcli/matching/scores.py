"""Log-sum-exps, attention outputs and key scores, streamed over tiles.

No pass here holds an `n × T` matrix: memory is a few tiles of `tile` elements, whatever the length
of the document and the number of reference queries. On CUDA the same passes are kernels where
Triton runs (see `amcli.kernels.statistics`); on a CPU, PyTorch's own kernel is used where it can.
"""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Literal, NamedTuple

import torch

from amcli.kernels import STATISTICS, cpu
from amcli.matching.tiles import TILE_ELEMENTS, Logits, spans, tile_shape, working_dtype

ScoreKind = Literal["max", "rms", "mean"]
SCORE_KINDS: tuple[ScoreKind, ...] = ("max", "rms", "mean")


class Stats(NamedTuple):
    """The attention of queries to some keys: `lse [H, n]`, the natural log of their mass, and
    `Y [H, n, dv]`, the attention output. Stats of two sets of keys merge into those of both."""

    lse: torch.Tensor
    Y: torch.Tensor

    def merged(self, other: Stats) -> Stats:
        """The stats of both sets of keys together."""
        lse = torch.logaddexp(self.lse, other.lse.to(self.lse.dtype))
        mine, others = (part.exp().unsqueeze(-1) for part in (self.lse - lse, other.lse - lse))
        return Stats(lse, self.Y * mine + other.Y.to(self.Y.dtype) * others)


def logsumexp(
    Q: torch.Tensor,
    K: torch.Tensor,
    logits: Logits,
    *,
    limit: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    tile: int = TILE_ELEMENTS,
) -> torch.Tensor:
    """Natural log of each query's mass on the keys, `[H, n]`, float32 (float64 for float64 inputs).

    `limit [n]` (ints): row `i` sees the keys with index `< limit[i]`; None means all of them.
    `bias [H, T]` is added to the logits. A row that sees no key has -inf.
    """
    return _stream(Q, K, None, logits, limit, bias, tile)[0]


def attention_stats(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    logits: Logits,
    *,
    limit: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    tile: int = TILE_ELEMENTS,
) -> Stats:
    """Log-sum-exp and attention output in one pass.

    Arguments as for `logsumexp`. A row that sees no key has lse -inf and output 0.
    Online softmax: Milakov and Gimelshein, arXiv 1805.02867.
    """
    lse, Y = _stream(Q, K, V, logits, limit, bias, tile)
    if Y is None:  # only to narrow the type: _stream returns outputs whenever it gets V
        raise ValueError("no values")
    return Stats(lse, Y)


def _stream(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor | None,
    logits: Logits,
    limit: torch.Tensor | None,
    bias: torch.Tensor | None,
    tile: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if Q.is_cuda:
        found = _row_stats(Q, K, V, logits, limit, bias)
        if found is not None:
            return found
    H, n, _ = Q.shape
    T = K.shape[1]
    dtype = working_dtype(Q, K)
    if V is not None and logits.softcap is None and limit is None:
        one, keys, values = (x.to(dtype).unsqueeze(0) for x in (Q, K, V))
        if cpu.can_take(one, keys, values):
            added = None if bias is None else bias.to(dtype).unsqueeze(0)
            outputs, masses = cpu.attention(one, keys, values, logits.scale, bias=added)
            return masses[0], outputs[0]
    rows, columns = tile_shape(H, n, T, tile, Q.device)
    lse = Q.new_empty((H, n), dtype=dtype)
    Y = None if V is None else Q.new_empty((H, n, V.shape[-1]), dtype=dtype)
    for r in spans(n, rows):
        size = r.stop - r.start
        m = Q.new_full((H, size), -torch.inf, dtype=dtype)  # running max
        mass = Q.new_zeros((H, size), dtype=dtype)  # sum of exp(s - m)
        out = None if V is None else Q.new_zeros((H, size, V.shape[-1]), dtype=dtype)
        for c in spans(T, columns):
            S = _visible_logits(Q, K, logits, limit, bias, r, c)
            m_new = torch.maximum(m, S.amax(-1))
            # Without this, a row that has seen nothing yet would subtract -inf from -inf.
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


def _row_stats(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor | None,
    logits: Logits,
    limit: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """`_stream` by a kernel; None where it cannot run."""

    def run(kernels: ModuleType) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        if not kernels.can_take(Q, K, Q if V is None else V):
            return None
        found: tuple[torch.Tensor, torch.Tensor | None] = kernels.row_stats(
            Q, K, V, logits.scale, logits.softcap, limit, bias
        )
        return found

    found: tuple[torch.Tensor, torch.Tensor | None] | None = STATISTICS.run(Q, run)
    return found


def _visible_logits(
    Q: torch.Tensor,
    K: torch.Tensor,
    logits: Logits,
    limit: torch.Tensor | None,
    bias: torch.Tensor | None,
    r: slice,
    c: slice,
) -> torch.Tensor:
    """Logits of one tile `[H, rows, columns]`, -inf where the row may not see the key."""
    S = logits(Q[:, r], K[:, c], None if bias is None else bias[:, c])
    if limit is None:
        return S
    position = torch.arange(c.start, c.stop, device=S.device)
    return S.masked_fill_(position >= limit[r].to(S.device).unsqueeze(-1), -torch.inf)


def column_stats(
    Q: torch.Tensor,
    K: torch.Tensor,
    lse: torch.Tensor,
    logits: Logits,
    limit: torch.Tensor | None,
    kinds: frozenset[ScoreKind],
    tile: int = TILE_ELEMENTS,
) -> dict[ScoreKind, torch.Tensor]:
    """Over all queries, for each key: the largest `exp(s - lse)`, the sum of squares, the sum.

    `lse [H, n]`; a query whose `lse` is infinite counts for nothing. Each `[H, T]`, by name
    (rms: the sum of squares, mean: the sum).
    """
    if Q.is_cuda:

        def run(kernels: ModuleType) -> dict[ScoreKind, torch.Tensor] | None:
            if not kernels.can_take(Q, K):
                return None
            made: dict[ScoreKind, torch.Tensor] = kernels.column_stats(
                Q, K, lse.float(), logits.scale, logits.softcap, limit, kinds
            )
            return made

        made: dict[ScoreKind, torch.Tensor] | None = STATISTICS.run(Q, run)
        if made is not None:
            return made
    (H, n, _), T = Q.shape, K.shape[1]
    dtype = working_dtype(Q, K)
    found = {kind: Q.new_zeros((H, T), dtype=dtype) for kind in SCORE_KINDS if kind in kinds}
    if "max" in found:
        found["max"].fill_(-torch.inf)
    shift = lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)
    height, width = tile_shape(H, n, T, tile, Q.device)
    for c in spans(T, width) if kinds else ():
        for r in spans(n, height):
            S = _visible_logits(Q, K, logits, limit, None, r, c).sub_(shift[:, r])
            if "max" in found:
                best = found["max"][:, c]
                torch.maximum(best, S.amax(1), out=best)
            if "mean" in found or "rms" in found:
                S = S.exp_()
            if "rms" in found:
                found["rms"][:, c] += torch.linalg.vector_norm(S, dim=1).square()
            if "mean" in found:
                found["mean"][:, c] += S.sum(1)
    if "max" in found:
        found["max"].exp_()
    return found


class ScoreState:
    """The attention that reference queries paid to each key, accumulated over chunks of queries.

    Holds max, sum of squares and sum of `W·P` per key, each `[H, T]`, so that a reference pass
    in chunks stores no queries. `kinds` says which statistics will be asked for; each costs a
    pass over the probabilities.
    """

    def __init__(
        self,
        heads: int,
        tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kinds: Collection[ScoreKind] = SCORE_KINDS,
    ):
        self.rows = 0
        self._shape = (heads, tokens)
        self._kept = {
            kind: torch.zeros(self._shape, device=device, dtype=dtype)
            for kind in SCORE_KINDS
            if kind in kinds
        }
        self._dtype = dtype

    def update(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        logits: Logits,
        *,
        weights: torch.Tensor | None = None,
        limit: torch.Tensor | None = None,
        fed: torch.Tensor | None = None,
        fed_limit: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
        start: int = 0,
        rows: torch.Tensor | None = None,
        tile: int = TILE_ELEMENTS,
    ) -> torch.Tensor:
        """Add a chunk of queries `Q [H, n, d]` over keys `K [H, T, d]`; returns W `[H, n]`.

        `K` may be a part of the document's keys, beginning at position `start`: the others are then
        treated as absent, and their scores stay as they are.

        `fed [H, m, d]` are keys that the queries see besides the document's; W is the share of
        a query's softmax mass that falls on the document, 1 without such keys. `limit [n]` and
        `fed_limit [n]` (ints): row `i` sees the keys with index below its limit; None means
        all. A row that sees no key counts for nothing. `weights [H, n]` multiply W. `total [H, n]`:
        log of each query's mass on all that it sees, if known, which saves a pass. `rows`: the rows
        to return W for, `[H, len(rows)]`; None: all.
        """
        H, n, _ = Q.shape
        T = K.shape[1]
        if self._shape[0] != H or not 0 <= start <= start + T <= self._shape[1]:
            raise ValueError(
                f"scores are kept for {self._shape} keys, got {H} heads of {T} from {start} on"
            )
        wanted = torch.arange(n, device=Q.device) if rows is None else rows
        # If the total is known, the fed keys matter only for W.
        asking = wanted if total is not None else slice(None)
        others = None
        if fed is not None and (total is None or len(wanted)):
            seen = None if fed_limit is None else fed_limit[asking]
            others = logsumexp(Q[:, asking], fed, logits, limit=seen, tile=tile)
        if total is None:
            on_document = logsumexp(Q, K, logits, limit=limit, tile=tile)
            total = on_document if others is None else torch.logaddexp(on_document, others)
            W = (on_document - total).exp()[:, wanted].nan_to_num(0.0)
        elif others is None:  # nothing was fed, or no W is asked for
            W = torch.ones_like(total[:, wanted])
        else:
            W = -torch.expm1((others - total[:, wanted]).clamp_max(0.0)).nan_to_num(0.0)
        if weights is not None:
            # Not just by adding logarithms: a row that sees no key may also have zero weight.
            given = weights.to(total.dtype)
            total = torch.where(given > 0, total - given.log(), torch.inf)
            W = W * weights[:, wanted].to(W.dtype)
        paid = column_stats(Q, K, total, logits, limit, frozenset(self._kept), tile)
        for kind, found in paid.items():
            kept = self._kept[kind][:, start : start + T]
            if kind == "max":
                torch.maximum(kept, found.to(kept.dtype), out=kept)
            else:
                kept += found
        self.rows += n
        return W.to(self._dtype)

    def scores(self, kind: ScoreKind) -> torch.Tensor:
        """`[H, T]`: the largest, root-mean-square or mean probability over all rows so far."""
        if kind not in self._kept:
            raise ValueError(f"no {kind!r} scores were kept, only {', '.join(self._kept)}")
        kept = self._kept[kind]
        if kind == "max":
            return kept.clone()
        mean = kept / max(1, self.rows)
        return mean.sqrt() if kind == "rms" else mean
