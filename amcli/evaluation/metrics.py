"""From outcomes to rows: means over questions, and how far they could be off.

Intervals are 95% percentile intervals of a two-stage bootstrap (Davison and Hinkley, Bootstrap
Methods and their Application, 1997, section 3.8): documents are drawn with replacement, then
questions within each. Questions about one document are not independent; this says so. All rows
are drawn with the same random numbers, so differences between rows are less noisy than the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 1000
LEVEL = 0.95

Record = tuple[float | None, float, float, int, int]
"""One question: score, summed NLL, summed KL (nats), agreeing tokens, tokens."""

_DIGITS = 6


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, where that was worked out."""

    value: float
    low: float | None = None
    high: float | None = None

    def record(self) -> dict[str, float]:
        """Six digits of each."""
        parts = {"value": self.value, "low": self.low, "high": self.high}
        return {k: round(v, _DIGITS) for k, v in parts.items() if v is not None}


METRICS = ("recall", "nll", "kl", "agreement")


def estimates(
    documents: Sequence[Sequence[Record]], seed: int, resamples: int = RESAMPLES
) -> dict[str, Estimate | None]:
    """`recall`, `nll`, `kl` and `agreement` of questions that are grouped by document.

    Recall is a mean over questions (None where the suite gives no score), the others are means
    over answer tokens, NLL and KL in nats. Documents without questions do not count. With no
    `resamples` there are no intervals.
    """
    groups = [list(group) for group in documents if group]
    if not groups:
        return dict.fromkeys(METRICS)
    scored = all(record[0] is not None for group in groups for record in group)
    table = _table(groups)  # [D, Q, 6]
    point = _means(table.sum(dim=(0, 1))[None])
    values = point[0].tolist()
    found: dict[str, Estimate | None]
    if resamples:
        drawn = _means(_resampled(table, [len(g) for g in groups], seed, resamples))
        tail = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
        low, high = torch.quantile(drawn, tail, dim=0).tolist()  # [2, 4]
        found = {m: Estimate(*v) for m, *v in zip(METRICS, values, low, high, strict=True)}
    else:
        found = {m: Estimate(v) for m, v in zip(METRICS, values, strict=True)}
    if not scored:
        found["recall"] = None
    return found


def _table(groups: Sequence[Sequence[Record]]) -> torch.Tensor:
    """`[D, Q, 6]` float64: the records and a count of 1; rows of padding are zero."""
    width = max(len(group) for group in groups)
    table = torch.zeros(len(groups), width, 6, dtype=torch.float64)
    for d, group in enumerate(groups):
        rows = [[record[0] or 0.0, *record[1:], 1.0] for record in group]
        table[d, : len(group)] = torch.tensor(rows, dtype=torch.float64)
    return table


def _means(sums: torch.Tensor) -> torch.Tensor:
    """`[R, 6]` sums to `[R, 4]`: score a question, NLL, KL and agreement a token."""
    score, nll, kl, agree, tokens, count = sums.unbind(1)
    tokens = tokens.clamp_min(1)
    return torch.stack([score / count, nll / tokens, kl / tokens, agree / tokens], dim=1)


def _resampled(
    table: torch.Tensor, sizes: Sequence[int], seed: int, resamples: int
) -> torch.Tensor:
    """`[resamples, 6]`: sums over documents, and questions within them, drawn anew each time."""
    D, Q, _ = table.shape
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(sizes)
    sums = torch.empty(resamples, table.shape[2], dtype=torch.float64)
    step = max(1, 2**20 // (D * Q))
    for start in range(0, resamples, step):
        n = min(step, resamples - start)
        document = torch.randint(D, (n, D), generator=generator)
        size = counts[document][..., None]  # [n, D, 1]
        place = torch.rand(n, D, Q, generator=generator, dtype=torch.float64)
        question = (place * size).long().clamp_max(size - 1)
        drawn = table[document[..., None], question]  # [n, D, Q, 6]
        real = torch.arange(Q) < size
        sums[start : start + n] = (drawn * real[..., None]).sum(dim=(1, 2))
    return sums
