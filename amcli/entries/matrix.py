"""A matrix of keys or values, one row per entry, in any form: numbers or codes.

Code that handles entries asks a matrix for rows, bytes or numbers and need not know its
form. Knows torch; knows nothing of models, files or methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from amcli.entries.catalogue import NATIVE


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of floats `x [..., d]`; its own inverse.

    Over groups of the largest power of two that divides `d`, in natural order. Sums and
    differences of neighbours at distance 1, 2, 4, ..., then one factor.
    """
    d = x.shape[-1]
    n = d & -d
    y = x.detach().contiguous()
    h = 1
    while h < n:
        pairs = y.view(-1, 2, h)
        y = torch.empty_like(y)
        mixed = y.view(-1, 2, h)
        torch.add(pairs[:, 0], pairs[:, 1], out=mixed[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=mixed[:, 1])
        h *= 2
    return y.mul_(n**-0.5) if n > 1 else y


def divisor(d: int, most: int) -> int:
    """The largest divisor of `d` up to `most`."""
    return next(b for b in range(min(d, most), 0, -1) if d % b == 0)


def taken(x: torch.Tensor, which: Sequence[slice]) -> torch.Tensor:
    """Some rows of a tensor, one slice after another: a view if there is one slice."""
    first, *others = [x[rows] for rows in which]
    return torch.cat([first, *others]) if others else first


class UnstorableError(ValueError):
    """Numbers that a store cannot hold: NaN, infinity, or too large for its scales.

    row    the first row, or the first of a group, that holds such a number
    head   the head it is in, of those that were rounded together, once known
    layer  the layer, of those that were compacted together, once known
    """

    def __init__(self, what: str, store: str, row: int):
        super().__init__(f"{what} cannot be stored as {store}")
        self.row = row
        self.head: int | None = None
        self.layer: int | None = None


class Matrix(ABC):
    """`[N, d]`, in one form; forms are frozen dataclasses of tensors.

    A form says which tensors it keeps (`parts`), how to make the same form from other tensors
    (`with_parts`), and which numbers they mean (`stored`). The rest is implemented here, for
    tensors with one row per row of the matrix; other forms override `rows`, `cat` and `fits`.
    """

    @property
    @abstractmethod
    def store(self) -> str:
        """The store it is in: a name of `catalogue.STORES`."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`(N, d)`."""

    @abstractmethod
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors, by the suffix of their names in a file: "" for the first, then ".scale"."""

    @abstractmethod
    def with_parts(self, parts: Sequence[torch.Tensor]) -> Self:
        """A matrix of this form with other tensors, in the order of `parts`."""

    @abstractmethod
    def stored(self) -> torch.Tensor:
        """`[N, d]` numbers as stored: still transformed if rows were `rotated`."""

    @property
    def rotated(self) -> bool:
        """Whether rows went through `hadamard`: products with `stored` rows need `hadamard(q)`."""
        return False

    def unpack(self) -> torch.Tensor:
        """`[N, d]` numbers."""
        x = self.stored()
        return hadamard(x) if self.rotated else x

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.parts().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors: what the matrix costs in memory and on disk."""
        return sum(x.numel() * x.element_size() for x in self.parts().values())

    @property
    def kind(self) -> Hashable:
        """What matrices must share to be joined: everything but the number of rows."""
        dtypes = tuple(x.dtype for x in self.parts().values())
        return type(self), self.store, self.rotated, self.shape[1], dtypes, self.device

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether the tensors alone, with heads of these lengths, say what the matrix is: False
        where several rows share something and do so across the heads in another way."""
        return True

    def rows(self, which: Sequence[slice]) -> Self:
        """The rows of at least one slice, one after another, each of whole heads: forms may keep
        what several rows of a head share. Views if it is one slice."""
        return self.with_parts([taken(x, which) for x in self.parts().values()])

    @classmethod
    def cat(cls, matrices: Sequence[Self]) -> Self:
        """The rows of matrices of one `kind`, one after another; a single one as it is."""
        first, *others = matrices
        if not others:
            return first
        columns = zip(*(x.parts().values() for x in matrices), strict=True)
        return first.with_parts([torch.cat(column) for column in columns])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """The same on another device; numbers in `dtype`, codes unchanged."""
        return self.with_parts([x.to(device) for x in self.parts().values()])


@dataclass(frozen=True)
class Numbers(Matrix):
    """Plain numbers `[N, d]`, in any float dtype. Raises ValueError for another shape."""

    numbers: torch.Tensor

    store: ClassVar[str] = NATIVE

    def __post_init__(self) -> None:
        if self.numbers.ndim != 2:
            raise ValueError(
                "keys and values of ragged heads are 2-D: [sum of lengths, head dim], "
                f"got {tuple(self.numbers.shape)}"
            )

    @classmethod
    def read(cls, parts: Mapping[str, torch.Tensor]) -> Numbers:
        """Numbers from the tensors that `parts` gave."""
        return cls(parts[""])

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, d)`."""
        N, d = self.numbers.shape
        return N, d

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        return self.numbers.device

    def parts(self) -> dict[str, torch.Tensor]:
        """The one tensor."""
        return {"": self.numbers}

    def with_parts(self, parts: Sequence[torch.Tensor]) -> Numbers:
        """Other numbers."""
        return Numbers(*parts)

    def stored(self) -> torch.Tensor:
        """The numbers themselves, not a copy."""
        return self.numbers

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Numbers:
        """The same on another device and in another dtype."""
        return Numbers(self.numbers.to(device=device, dtype=dtype))
