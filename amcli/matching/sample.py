"""Reference queries, and the one place that remembers their attention to the document."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from amcli.matching.scores import Stats, attention_stats
from amcli.matching.tiles import TILE_ELEMENTS, Logits, working_dtype


@dataclass(frozen=True)
class Queries:
    """Reference queries of some heads, and their attention to the whole document.

    Q    `[H, n, d]`, post-RoPE, the query heads of a group folded into the rows
    W    `[H, n]` in (0, 1], the share of each query's mass that falls on the document; None: 1
    lse  `[H, n]`, natural log of its mass on the document
    Y    `[H, n, dv]`, its attention output over the document

    lse and Y in float32 or float64. Raises ValueError for shapes that do not fit each other.
    """

    Q: torch.Tensor
    W: torch.Tensor | None
    lse: torch.Tensor
    Y: torch.Tensor

    def __post_init__(self) -> None:
        check_shapes(self.Q, self.W)
        if self.lse.shape != self.Q.shape[:2] or self.Y.shape[:2] != self.Q.shape[:2]:
            raise ValueError(
                f"{tuple(self.lse.shape)} masses and {tuple(self.Y.shape)} outputs for "
                f"{tuple(self.Q.shape)} queries"
            )

    @classmethod
    def over(
        cls,
        Q: torch.Tensor,
        W: torch.Tensor | None,
        K: torch.Tensor,
        V: torch.Tensor,
        logits: Logits,
        tile: int = TILE_ELEMENTS,
    ) -> Queries:
        """Queries with their attention to the document `K [H, T, d]`, `V [H, T, dv]`, computed now.

        `Q [H, n, d]`, `W [H, n]` or None; `n` may be 0. Raises ValueError for other shapes.
        """
        check_shapes(Q, W, K)
        if Q.shape[1]:
            return cls(Q, W, *attention_stats(Q, K, V, logits, tile=tile))
        dtype = working_dtype(Q, K)
        Y = Q.new_zeros((Q.shape[0], 0, V.shape[2]), dtype=dtype)
        return cls(Q, W, Q.new_zeros(Q.shape[:2], dtype=dtype), Y)

    @classmethod
    def joined(cls, parts: Sequence[Queries]) -> Queries:
        """The heads of all parts, one after another."""
        weights = [x.W for x in parts if x.W is not None]
        if weights and len(weights) < len(parts):
            raise ValueError("queries with weights and without")
        return cls(
            torch.cat([x.Q for x in parts]),
            torch.cat(weights) if weights else None,
            torch.cat([x.lse for x in parts]),
            torch.cat([x.Y for x in parts]),
        )

    @property
    def count(self) -> int:
        """Queries of each head."""
        return self.Q.shape[1]

    @property
    def weights(self) -> torch.Tensor:
        """W, or ones, `[H, n]`; contiguous ones, so that no sum depends on the layout of lse."""
        return self.lse.new_ones(self.lse.shape) if self.W is None else self.W

    def of(self, heads: list[int]) -> Queries:
        """The queries of some heads."""
        W = None if self.W is None else self.W[heads]
        return Queries(self.Q[heads], W, self.lse[heads], self.Y[heads])


class Sample:
    """The reference queries of one layer, and a memo of what compactions with them compute.

    Q `[H, n, d]`, W `[H, n]` or None (1), the logits' scale and softcap; `n` is 0 for a method
    without queries. All calls must be about the same keys and values.

    The sample's attention to the document is computed in one place (`Queries.over`) and kept in
    this one. Once known, as from a reference pass (`truth`), it stays. Otherwise it is kept only if
    `kept`, for further methods and ratios, as Y is as large as the queries, in float32. If not,
    the sample `waits`: a compaction of many layers computes it bucket by bucket, and forgets it.

    kept    whether results stay: the attention to the document, and what `once` makes
    nested  every order of selection is kept too, and a shorter one is the beginning of a longer
            one, so that a search over ratios selects once. Only for calls with one method and one
            seed; a longer order was chosen among more candidates, so the selection may differ
            slightly from that of a separate call.

    Raises ValueError for weights that do not fit the queries.
    """

    def __init__(
        self,
        Q: torch.Tensor,
        W: torch.Tensor | None,
        logits: Logits,
        *,
        truth: Stats | None = None,
        kept: bool = False,
        nested: bool = False,
    ) -> None:
        check_shapes(Q, W)
        self.Q = Q
        self.W = W
        self.logits = logits
        self.kept = kept
        self.nested = nested
        self._asked = None if truth is None else Queries(Q, W, *truth)
        self._found: dict[Hashable, torch.Tensor] = {}
        self._orders: dict[int, torch.Tensor] = {}  # head -> positions, best first

    @classmethod
    def joined(cls, parts: Sequence[Sample]) -> Sample:
        """The queries of all parts, one after another, with their attention to the document if all
        parts know it."""
        W, truth = None, None
        if any(x.W is not None for x in parts):
            W = torch.cat([x.weights for x in parts], dim=1)
        known = [x._asked for x in parts if x._asked is not None]
        if len(known) == len(parts):
            masses, outputs = ([x.lse for x in known], [x.Y for x in known])
            truth = Stats(torch.cat(masses, dim=1), torch.cat(outputs, dim=1))
        Q = torch.cat([x.Q for x in parts], dim=1)
        return cls(Q, W, parts[-1].logits, truth=truth)

    def part(self, count: int, seed: int) -> Sample:
        """`count` of the queries, a seeded choice, in their order; all if there are fewer."""
        n = self.Q.shape[1]
        if n <= count:
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(n, generator=generator)[:count].sort().values.to(self.Q.device)
        truth, known = None, self._asked
        if known is not None:
            truth = Stats(known.lse[:, chosen], known.Y[:, chosen])
        W = None if self.W is None else self.W[:, chosen]
        return Sample(self.Q[:, chosen], W, self.logits, truth=truth)

    @property
    def weights(self) -> torch.Tensor:
        """W, or ones in float32, `[H, n]`."""
        return torch.ones(self.Q.shape[:2], device=self.Q.device) if self.W is None else self.W

    @property
    def waits(self) -> bool:
        """Whether the attention to the document is not known and would not be kept."""
        return self._asked is None and not self.kept

    def queries(self, K: torch.Tensor, V: torch.Tensor, tile: int = TILE_ELEMENTS) -> Queries:
        """All heads' queries with their attention to the document `K [H, T, d]`, `V [H, T, dv]`.

        Raises ValueError for keys with another number of heads or another dimension.
        """
        if self._asked is not None:
            return self._asked
        found = Queries.over(self.Q, self.W, K, V, self.logits, tile)
        if self.kept:
            self._asked = found
        return found

    def once(self, name: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` returns, or returned in an earlier call with that name."""
        if name in self._found:
            return self._found[name]
        found = make()
        if self.kept:
            self._found[name] = found
        return found

    def order(self, head: int, length: int) -> torch.Tensor | None:
        """At least `length` positions of a head, best first; None if not known."""
        found = self._orders.get(head)
        return found if found is not None and len(found) >= length else None

    def remember(self, head: int, order: torch.Tensor) -> None:
        """Keeps the order of a head for later calls."""
        if self.nested:
            self._orders[head] = order


def check_shapes(Q: torch.Tensor, W: torch.Tensor | None, K: torch.Tensor | None = None) -> None:
    """Raises ValueError unless `Q [H, n, d]`, `W [H, n]` or None and `K [H, T, d]`, if any, fit."""
    if K is not None and (Q.ndim != 3 or Q.shape[0] != K.shape[0] or Q.shape[2] != K.shape[2]):
        raise ValueError(f"{tuple(Q.shape)} queries for {tuple(K.shape)} keys")
    if Q.ndim != 3:
        raise ValueError(f"queries of shape {tuple(Q.shape)}, not [H, n, d]")
    if W is not None and W.shape != Q.shape[:2]:
        raise ValueError(f"{tuple(W.shape)} weights for {tuple(Q.shape)} queries")


def orders(owners: Sequence[tuple[Sample, int]], lengths: Sequence[int]) -> torch.Tensor | None:
    """`[heads, longest]`, with the first `lengths` of each row real; None unless all are known.

    `owners`: the sample of each head's layer, and the head's index in that layer.
    """
    found = [sample.order(head, t) for (sample, head), t in zip(owners, lengths, strict=True)]
    rows = [x for x in found if x is not None]
    if len(rows) < len(found):
        return None
    longest = max(lengths)
    return torch.stack(
        [torch.nn.functional.pad(x[:longest], (0, longest - len(x[:longest]))) for x in rows]
    )
