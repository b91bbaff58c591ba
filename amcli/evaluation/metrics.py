"""From outcomes to rows: means over questions, and how uncertain they are.

Intervals are 95% percentile intervals of a two-stage bootstrap (Davison and Hinkley, Bootstrap
Methods and their Application, 1997, section 3.8): documents are drawn with replacement, then
questions within each. Questions about one document are not independent; this says so. All rows
are drawn with the same random numbers, so differences between rows are less noisy than the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 1000
LEVEL = 0.95

Record = Mapping[str, float]
"""One question: the numbers to add up, by name, without those not measured; NaN is a value."""

METRICS = {
    "recall": ("score", "questions"),
    "nll": ("nll", "tokens"),
    "kl": ("kl", "tokens"),
    "agreement": ("agree", "tokens"),
    "lost": ("kl", "none_kl"),
    "same": ("own_same", "questions"),
    "own_nll": ("own_nll", "own_tokens"),
    "own_kl": ("own_kl", "own_tokens"),
    "own_agreement": ("own_agree", "own_tokens"),
    "own_lost": ("own_kl", "own_none_kl"),
    "f1": ("f1", "questions"),
    "contains": ("contains", "questions"),
}
"""Each metric is one sum over another; `questions` is 1 for each question."""

_DIGITS = 6


@dataclass(frozen=True)
class Estimate:
    """A mean, with its 95% interval if it was computed."""

    value: float
    low: float | None = None
    high: float | None = None

    def record(self) -> dict[str, float]:
        """The numbers, to six digits each."""
        parts = {"value": self.value, "low": self.low, "high": self.high}
        return {k: round(v, _DIGITS) for k, v in parts.items() if v is not None}


def estimates(
    documents: Sequence[Sequence[Record]], seed: int, resamples: int = RESAMPLES
) -> dict[str, Estimate | None]:
    """All `METRICS` of questions grouped by document.

    None for a metric if any question lacks its sum. Documents without questions do not count. Sums
    that are not finite make estimates that are not finite. Without `resamples` there are no
    intervals.
    """
    groups = [[{"questions": 1.0, **record} for record in group] for group in documents if group]
    found: dict[str, Estimate | None] = dict.fromkeys(METRICS)
    if not groups:
        return found
    known = set.intersection(*(set(record) for group in groups for record in group))
    measured = {name: pair for name, pair in METRICS.items() if known.issuperset(pair)}
    columns = list(dict.fromkeys(column for pair in measured.values() for column in pair))
    table = _table(groups, columns)  # [D, Q, columns]
    pairs = [[columns.index(column) for column in pair] for pair in measured.values()]
    values = _ratios(table.sum(dim=(0, 1))[None], pairs)[0].tolist()
    if not resamples:
        return found | {m: Estimate(v) for m, v in zip(measured, values, strict=True)}
    drawn = _ratios(_resampled(table, [len(g) for g in groups], seed, resamples), pairs)
    tail = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(drawn, tail, dim=0).tolist()
    return found | {m: Estimate(*v) for m, *v in zip(measured, values, low, high, strict=True)}


def _table(groups: Sequence[Sequence[Record]], columns: Sequence[str]) -> torch.Tensor:
    """`[D, Q, columns]` float64: the records; rows of padding are zero."""
    width = max(len(group) for group in groups)
    table = torch.zeros(len(groups), width, len(columns), dtype=torch.float64)
    for d, group in enumerate(groups):
        rows = [[record[column] for column in columns] for record in group]
        table[d, : len(group)] = torch.tensor(rows, dtype=torch.float64)
    return table


def _ratios(sums: torch.Tensor, pairs: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[R, columns]` sums to `[R, metrics]`: one column over another."""
    above, below = torch.tensor(pairs).unbind(1)
    return sums[:, above] / sums[:, below]


def _resampled(
    table: torch.Tensor, sizes: Sequence[int], seed: int, resamples: int
) -> torch.Tensor:
    """`[resamples, columns]`: sums over documents, and questions within them, drawn each time."""
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
        drawn = table[document[..., None], question]  # [n, D, Q, columns]
        real = torch.arange(Q) < size
        sums[start : start + n] = torch.where(real[..., None], drawn, 0.0).sum(dim=(1, 2))
    return sums
