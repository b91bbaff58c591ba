"""What attention needs to know of the entries before the live tokens.

`Entries` are the prefix of one context, which every row of a batch sees; `serving` makes a prefix
of several contexts. The kernels and the models know no more than this.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

from amcli.entries.ragged import Entries


class Prefix(Protocol):
    """Entries of one context or several in one flat buffer, and which of them each batch row sees.

    Context after context, each with its `kv_heads` heads: head `h` of context `p` is number
    `p * kv_heads + h` in `entries.lengths`.
    """

    @property
    def entries(self) -> Entries:
        """The entries of all contexts."""

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""

    @property
    def batch(self) -> tuple[int, ...] | None:
        """The context of each batch row; None: any number of rows, which all see the only one."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries of each KV head, over all contexts."""

    @property
    def key_dim(self) -> int:
        """Numbers of a key."""

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""

    @property
    def nbytes(self) -> int:
        """Bytes of the entries of all contexts."""

    @property
    def derived(self) -> dict[Hashable, Any]:
        """What kernels derive from the prefix and keep for later; it lives as long as this does."""

    def contexts(self) -> Iterator[tuple[Entries, Sequence[int] | slice]]:
        """Each context that some row sees: views of its entries, and the rows that see it."""

    def select(self, rows: Sequence[int]) -> Prefix:
        """A prefix for rows of this one's batch, in that order; the entries are shared."""
