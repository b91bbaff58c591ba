"""How the kernels take entries of each store: which branch reads them, and what it gets.

Stores not listed here are left to plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from amcli.entries.blocks import block_size
from amcli.entries.catalogue import NATIVE
from amcli.entries.matrix import Matrix
from amcli.entries.ragged import Entries
from amcli.kernels.attention import stores

_OPERANDS = "operands of the attention kernels"


@dataclass(frozen=True)
class Form:
    """A store as the kernels see it.

    kind      the branch of `stores.entries` that reads it
    block     how many numbers of a row of `d` share a scale and are loaded together
    multiple  a block has to be a multiple of this
    operand   a matrix as the branch takes it: the codes or numbers, and any scales; views
    """

    kind: int
    block: Callable[[int], int]
    multiple: int
    operand: Callable[[Matrix], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Operands:
    """The tensors of some entries as the kernels take them."""

    keys: torch.Tensor
    key_scale: torch.Tensor | None
    values: torch.Tensor
    value_scale: torch.Tensor | None


def _numbers(matrix: Matrix) -> tuple[torch.Tensor, None]:
    return matrix.parts()[""], None


def _codes(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    parts = matrix.parts()
    return parts[""], parts[".scale"]


def _pairs(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """4-bit codes as pairs of bytes."""
    parts = matrix.parts()
    return parts[""].view(torch.uint16), parts[".scale"]


FORMS = {
    NATIVE: Form(stores.NATIVE.value, lambda d: d, 1, _numbers),
    "int8": Form(stores.INT8.value, block_size, 1, _codes),
    "int4": Form(stores.INT4.value, block_size, 4, _pairs),
}
"""The stores that the kernels read."""


def takes(entries: Entries) -> bool:
    """Whether the kernels read entries stored like these."""
    form = FORMS.get(entries.store)
    if form is None or entries.values.store != entries.store:
        return False
    return all(form.block(d) % form.multiple == 0 for d in (entries.key_dim, entries.value_dim))


def operands(entries: Entries) -> Operands:
    """The tensors of entries that `takes` accepts, found once and kept with the entries."""
    found: Operands | None = entries.derived.get(_OPERANDS)
    if found is None:
        operand = FORMS[entries.store].operand
        found = Operands(*operand(entries.keys), *operand(entries.values))
        entries.derived[_OPERANDS] = found
    return found
