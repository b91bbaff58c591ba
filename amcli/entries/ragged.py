"""Entries of one layer, stored head after head with no padding.

The one data structure that the maths (`matching`), the runtime (`models`) and the file
(`storage`) share. Knows torch; knows nothing of models, files or methods.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch

from amcli.entries.matrix import Matrix, Numbers, taken

# Numbers dequantised at a time in attention: a CPU is fastest within its caches, a GPU in one go.
_UNPACK_ELEMENTS = {"cpu": 1 << 20}
_UNPACK_ELEMENTS_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Entries:
    """`(C_k, beta, C_v)` of every KV head of one layer, flat: head `h` owns `lengths[h]` rows.

    keys     `[N, d]`, post-RoPE; `N = sum(lengths)`
    values   `[N, dv]`
    beta     `[N]` float32, added to the scaled logit of its key; None means all zero
    lengths  one int per KV head, >= 0, in head order
    derived  what kernels derive from the entries and keep for later; it lives as long as they do

    Keys and values are numbers or codes; codes stay codes in memory and become numbers only during
    attention. Entries are also the `prefix.Prefix` of one context. Raises ValueError when shapes
    or dtypes disagree.
    """

    keys: Matrix
    values: Matrix
    beta: torch.Tensor | None
    lengths: tuple[int, ...]
    derived: dict[Hashable, Any] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        rows = sum(self.lengths)
        if any(t < 0 for t in self.lengths):
            raise ValueError(f"negative head length in {self.lengths}")
        if self.keys.shape[0] != rows or self.values.shape[0] != rows:
            raise ValueError(
                f"head lengths sum to {rows}, but keys have {self.keys.shape[0]} rows "
                f"and values {self.values.shape[0]}"
            )
        if self.beta is not None and (
            self.beta.shape != (rows,) or self.beta.dtype != torch.float32
        ):
            raise ValueError(
                f"beta must be float32 [{rows}], got {self.beta.dtype} {tuple(self.beta.shape)}"
            )

    # ---- making them -----------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        beta: torch.Tensor | None,
        lengths: tuple[int, ...],
    ) -> Entries:
        """Entries as numbers: `keys [N, d]`, `values [N, dv]` of one dtype and device."""
        return cls(Numbers(keys), Numbers(values), beta, lengths)

    @classmethod
    def dense(cls, keys: torch.Tensor, values: torch.Tensor) -> Entries:
        """Every head with all its keys: `keys [H, n, d]`, `values [H, n, dv]`, no beta."""
        H, n, d = keys.shape
        flat = values.reshape(H * n, values.shape[2])
        return cls.of(keys.reshape(H * n, d), flat, None, (n,) * H)

    @classmethod
    def cat(cls, parts: Sequence[Entries]) -> Entries:
        """The heads of all parts, one part after another; a single part is returned as it is.

        Parts without a beta get zeros if any other part has one. Raises ValueError for parts of
        different `kind`.
        """
        first, *others = parts
        if any(part.kind != first.kind for part in others):
            raise ValueError("entries that are stored in different ways are not one")
        if not others:
            return first
        beta = None
        if any(part.beta is not None for part in parts):
            beta = torch.cat([part._beta() for part in parts])
        return cls(
            type(first.keys).cat([part.keys for part in parts]),
            type(first.values).cat([part.values for part in parts]),
            beta,
            tuple(t for part in parts for t in part.lengths),
        )

    # ---- what they are ---------------------------------------------------------------------

    @property
    def store(self) -> str:
        """How they are stored: a name of `catalogue.STORES`."""
        return self.keys.store

    @property
    def kind(self) -> Hashable:
        """What entries must share to be joined."""
        return self.keys.kind, self.values.kind

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.keys.device

    @property
    def key_dim(self) -> int:
        """Numbers of a key."""
        return self.keys.shape[1]

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""
        return self.values.shape[1]

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each head, and the total at the end: `len(lengths) + 1` ints."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what the entries cost in memory and on disk."""
        beta = 0 if self.beta is None else self.beta.numel() * self.beta.element_size()
        return self.keys.nbytes + self.values.nbytes + beta

    @property
    def rotated(self) -> bool:
        """Whether `heads` gives transformed keys, which need transformed queries."""
        return self.keys.rotated

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name in a file: `keys`, `keys.scale`, ..., `beta`, in that order;
        `stores.read` turns them back into entries. Raises ValueError for entries that were joined
        and could not be read back; see `stores.settled`."""
        if not self.keys.fits(self.lengths) or not self.values.fits(self.lengths):
            raise ValueError("joined entries share scales in another way than those of a file")
        found = {f"keys{part}": x for part, x in self.keys.parts().items()}
        found |= {f"values{part}": x for part, x in self.values.parts().items()}
        return found if self.beta is None else {**found, "beta": self.beta}

    # ---- other entries made of them ----------------------------------------------------------

    def rows(self, which: Sequence[slice], lengths: tuple[int, ...]) -> Entries:
        """The rows of slices, each of whole heads, forming heads of these `lengths`; views if it is
        one slice."""
        beta = None if self.beta is None else taken(self.beta, which)
        return Entries(self.keys.rows(which), self.values.rows(which), beta, lengths)

    def of_heads(self, first: int, last: int) -> Entries:
        """Views of the heads from `first` to before `last`."""
        rows = slice(self.offsets[first], self.offsets[last])
        return self.rows([rows], self.lengths[first:last])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Entries:
        """The same on another device: numbers in `dtype`, codes as they are, beta in float32."""
        beta = None if self.beta is None else self.beta.to(device=device)
        keys, values = self.keys.to(device, dtype), self.values.to(device, dtype)
        return Entries(keys, values, beta, self.lengths)

    def unpack(self) -> Entries:
        """The same as numbers; codes become float32, bit for bit what they were rounded to."""
        if isinstance(self.keys, Numbers) and isinstance(self.values, Numbers):
            return self
        return Entries.of(self.keys.unpack(), self.values.unpack(), self.beta, self.lengths)

    def heads(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """`(keys [t_h, d], values [t_h, dv], beta [t_h] or None)` in head order: views of numbers,
        codes as float32.

        Keys are as stored: if `rotated`, multiply them with `hadamard(q)` instead of `q`, since
        there are far fewer queries than keys. Values are as stored, too: if `values.rotated`, take
        `hadamard` of what attention gives. A few heads at a time are dequantised: few steps for
        short heads, bounded memory for long ones.
        """
        room = _UNPACK_ELEMENTS.get(self.device.type, _UNPACK_ELEMENTS_ELSEWHERE)
        room //= max(1, self.key_dim + self.value_dim)
        first = 0
        while first < len(self.lengths):
            last = first + 1
            while last < len(self.lengths) and sum(self.lengths[first : last + 1]) <= room:
                last += 1
            few = self.of_heads(first, last)
            keys, values = few.keys.stored(), few.values.stored()
            for start, t in zip(few.offsets, few.lengths, strict=False):
                rows = slice(start, start + t)
                yield keys[rows], values[rows], None if few.beta is None else few.beta[rows]
            first = last

    def _beta(self) -> torch.Tensor:
        """`[N]` float32."""
        if self.beta is not None:
            return self.beta
        return torch.zeros(sum(self.lengths), device=self.device)

    # ---- as the prefix of one context, which all rows of a batch see -------------------------

    @property
    def entries(self) -> Entries:
        """These entries."""
        return self

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return len(self.lengths)

    @property
    def batch(self) -> None:
        """None: every row sees these entries."""
        return None

    def contexts(self) -> Iterator[tuple[Entries, slice]]:
        """The only context, seen by all rows."""
        yield self, slice(None)

    def select(self, rows: Sequence[int]) -> Entries:
        """What those rows see: these same entries."""
        return self


def appended(parts: Sequence[Entries], dtype: torch.dtype) -> Entries:
    """The entries of consecutive contexts as one: head `h` gets the entries of all parts.

    A single part is returned as it is; parts in different stores become numbers in `dtype`. Raises
    ValueError for parts of different shapes.
    """
    if len({(len(part.lengths), part.key_dim, part.value_dim) for part in parts}) != 1:
        raise ValueError("contexts of one model have as many heads and numbers a key and value")
    if len(parts) == 1:
        return parts[0]
    if len({part.kind for part in parts}) != 1:
        parts = [part.unpack().to(part.device, dtype) for part in parts]
    flat, H = Entries.cat(parts), len(parts[0].lengths)
    rows = [slice(*ends) for ends in pairwise(flat.offsets)]
    order = [rows[h + p * H] for h in range(H) for p in range(len(parts))]
    return flat.rows(order, tuple(sum(flat.lengths[h::H]) for h in range(H)))
