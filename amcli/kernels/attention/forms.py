"""How the kernels take entries of each store: which branch reads them, and what it gets.

Stores not listed here are left to plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd

import torch

from amcli.entries import blocks, turned
from amcli.entries.catalogue import NATIVE, PACKED
from amcli.entries.matrix import Matrix
from amcli.entries.planes import PLANES
from amcli.entries.ragged import Entries
from amcli.kernels.attention import stores

_OPERANDS = "operands of the attention kernels"


@dataclass(frozen=True)
class Form:
    """A store as the kernels see it.

    kind      the branch of `device.partial` that reads it
    block     how many numbers of a row of `d` share a scale and are loaded together
    multiple  a block has to be a multiple of this
    keys      a matrix of keys as the branch takes it: codes or numbers, any scales and zeros; views
    values    a matrix of values, likewise
    bits      of a number of a key and of a value, for packed codes
    """

    kind: int
    block: Callable[[int], int]
    multiple: int
    keys: Callable[[Matrix], tuple[torch.Tensor | None, ...]]
    values: Callable[[Matrix], tuple[torch.Tensor | None, ...]]
    bits: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Operands:
    """The tensors of some entries as the kernels take them."""

    keys: torch.Tensor | None
    key_scale: torch.Tensor | None
    key_zero: torch.Tensor | None
    values: torch.Tensor | None
    value_scale: torch.Tensor | None


@dataclass(frozen=True)
class Words:
    """How rows of packed codes are read.

    unit   bytes of a word
    parts  parts of a row that are read by themselves
    wide   words of a part, padded
    """

    unit: int
    parts: int
    wide: int


def words(d: int, bits: int, block: int, least: int) -> Words:
    """For rows of `d` codes, so that the codes at one place of the words of a part, every `unit`th
    column of a range, lie within `block` columns; of two bytes if that leaves `least` words."""
    columns = d * PLANES[bits][0] // 8
    part = gcd(columns, block)
    unit = 2 if part >= 2 * least and d % 16 == 0 else 1
    return Words(unit, columns // part, max(16, 1 << (part // unit - 1).bit_length()))


def key_words(d: int, bits: int) -> Words:
    """For keys, of which a matrix unit takes 16 columns at a time."""
    return words(d, bits, d, 16)


def value_words(d: int, bits: int) -> Words:
    """For values, of which four warps share 32 columns without doing anything twice."""
    return words(d, bits, turned.block_size(d), 32)


def _numbers(matrix: Matrix) -> tuple[torch.Tensor, None]:
    return matrix.parts()[""], None


def _codes(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    parts = matrix.parts()
    return parts[""], parts[".scale"]


def _pairs(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """4-bit codes as pairs of bytes."""
    parts = matrix.parts()
    return parts[""].view(torch.uint16), parts[".scale"]


def _packed_keys(bits: int, matrix: Matrix) -> tuple[torch.Tensor, ...]:
    """Words, and what the channels of a word's codes have, in one number."""
    codes, scale, zero = matrix.parts().values()
    if key_words(matrix.shape[1], bits).unit == 1:
        return codes, scale, zero
    return codes.view(torch.uint16), scale.view(torch.int32), zero.view(torch.int32)


def _packed_values(bits: int, matrix: Matrix) -> tuple[torch.Tensor, ...]:
    """Words, and scales, an even number of them two by two."""
    codes, scale = matrix.parts().values()
    if value_words(matrix.shape[1], bits).unit == 2:
        codes = codes.view(torch.uint16)
    return codes, scale if scale.shape[1] % 2 else scale.view(torch.int32)


FORMS = {
    NATIVE: Form(stores.NATIVE.value, lambda d: d, 1, _numbers, _numbers),
    "int8": Form(stores.INT8.value, blocks.block_size, 1, _codes, _codes),
    "int4": Form(stores.INT4.value, blocks.block_size, 4, _pairs, _pairs),
    **{
        name: Form(
            stores.PACKED.value,
            turned.block_size,
            1,
            partial(_packed_keys, bits[0]),
            partial(_packed_values, bits[1]),
            bits,
        )
        for name, bits in PACKED.items()
    },
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
        form = FORMS[entries.store]
        keys, key_scale, *zero = form.keys(entries.keys)
        found = Operands(keys, key_scale, zero[0] if zero else None, *form.values(entries.values))
        entries.derived[_OPERANDS] = found
    return found
