"""What compactions of one layer have in common, found once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from .scores import Stats, attention_stats
from .tiles import TILE_ELEMENTS


class Known:
    """What compactions of one layer have in common when its queries, keys and values are the same.

    `kept`: what the whole document gives the queries is found once, for all methods and ratios;
    `truth`: it is known already.
    `nested`: every order of selection is kept too, and a shorter one is the beginning of a longer
    one, so that a search over ratios selects once. Only for calls with one method and one seed;
    the longer order was chosen among more candidates, so that what is selected may differ a
    little from what a call by itself selects.
    """

    def __init__(
        self, kept: bool = False, nested: bool = False, truth: Stats | None = None
    ) -> None:
        self.kept = kept
        self.nested = nested
        self._truth = truth
        self._found: dict[Hashable, torch.Tensor] = {}
        self._orders: dict[int, torch.Tensor] = {}  # head -> positions, best first

    def truth(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        scale: float,
        softcap: float | None,
        tile: int = TILE_ELEMENTS,
    ) -> Stats | None:
        """Log mass and outputs of all heads; None with no queries."""
        if self._truth is not None:
            return self._truth
        found = None
        if Q.shape[1]:
            found = attention_stats(Q, K, V, scale, softcap=softcap, tile=tile)
        if self.kept:
            self._truth = found
        return found

    @property
    def waits(self) -> bool:
        """Whether `truth` neither is known nor would be kept."""
        return self._truth is None and not self.kept

    def once(self, name: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives, from an earlier call of that name where there was one."""
        if name in self._found:
            return self._found[name]
        found = make()
        if self.kept:
            self._found[name] = found
        return found

    def order(self, head: int, length: int) -> torch.Tensor | None:
        """At least `length` positions of a head, best first; None where they are not known."""
        found = self._orders.get(head)
        return found if found is not None and len(found) >= length else None

    def remember(self, head: int, order: torch.Tensor) -> None:
        """The order of a head, for calls to come."""
        if self.nested:
            self._orders[head] = order


def orders(known: Sequence[tuple[Known, int]], lengths: Sequence[int]) -> torch.Tensor | None:
    """`[heads, longest]`, the first `lengths` of each row real; None where not all are known."""
    found = [layer.order(head, t) for (layer, head), t in zip(known, lengths, strict=True)]
    rows = [x for x in found if x is not None]
    if len(rows) < len(found):
        return None
    longest = max(lengths)
    return torch.stack(
        [torch.nn.functional.pad(x[:longest], (0, longest - len(x[:longest]))) for x in rows]
    )
