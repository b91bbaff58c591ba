"""What attention has to know of the entries in front of the live tokens.

`Entries` are the prefix of one context, which every row of a batch sees; `serving` makes one of
several contexts. The kernels and the models know no more than this.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

from amcli.entries.ragged import Entries


class Prefix(Protocol):
    """Entries of one context or several in one flat buffer, and which of them each batch row sees.

    entries   context after context, each with its `kv_heads` heads: head `h` of context `p` is
              number `p * kv_heads + h` in `entries.lengths`
    kv_heads  of the layer
    batch     the context of each batch row; None: any number of rows, which all see the only one
    lengths   entries of each KV head, over all contexts
    derived   what kernels make of the prefix and want to find again: it goes when that goes
    """

    @property
    def entries(self) -> Entries: ...  # noqa: D102 - see above
    @property
    def kv_heads(self) -> int: ...  # noqa: D102
    @property
    def batch(self) -> tuple[int, ...] | None: ...  # noqa: D102
    @property
    def lengths(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def derived(self) -> dict[Hashable, Any]: ...  # noqa: D102

    @property
    def key_dim(self) -> int:
        """Numbers of a key."""

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""

    @property
    def nbytes(self) -> int:
        """Bytes of the entries of all contexts."""

    def contexts(self) -> Iterator[tuple[Entries, Sequence[int] | slice]]:
        """Each context that some row sees: views of its entries, and those rows."""

    def select(self, rows: Sequence[int]) -> Prefix:
        """A prefix for rows of this one's batch, in that order; the entries are shared."""
