"""One layer's entries of several contexts: for the rows of a batch, or one context after another.

Knows the two kinds of entries; knows nothing of models, files or methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from amcli.entries.quantize import Entries, Packed, QuantizedHeads
from amcli.entries.ragged import RaggedHeads


@dataclass(frozen=True)
class BatchedPrefix:
    """Entries of several contexts in one flat buffer, and which of them each batch row sees.

    entries  context after context, each with its `kv_heads` heads: head `h` of context `p` is
             number `p * kv_heads + h` in `entries.lengths`
    rows     the context of each batch row; rows of one context share its entries

    Raises ValueError when a row names no context, or the heads do not divide into contexts.
    """

    entries: Entries
    kv_heads: int
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        heads = len(self.entries.lengths)
        if self.kv_heads < 1 or heads == 0 or heads % self.kv_heads:
            raise ValueError(f"{heads} heads are not contexts of {self.kv_heads} heads each")
        if not self.rows or min(self.rows) < 0 or max(self.rows) >= heads // self.kv_heads:
            raise ValueError(f"rows {self.rows} of {heads // self.kv_heads} contexts")

    @classmethod
    def join(cls, parts: Sequence[Entries]) -> BatchedPrefix:
        """Row `b` sees `parts[b]`; the same object given twice is stored once.

        The parts are copied into one buffer. Raises ValueError unless all of them are of one
        store, with as many heads and numbers a key and value.
        """
        distinct = list({id(part): part for part in parts}.values())
        number = {id(part): p for p, part in enumerate(distinct)}
        if len({_kind(part) for part in distinct}) != 1:
            raise ValueError("a batch wants contexts of one model, stored in one way")
        rows = tuple(number[id(part)] for part in parts)
        return cls(_concatenate(distinct), len(parts[0].lengths), rows)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries of each KV head, over all contexts."""
        flat, H = self.entries.lengths, self.kv_heads
        return tuple(sum(flat[h::H]) for h in range(H))

    @property
    def key_dim(self) -> int:
        """Numbers of a key."""
        return self.entries.key_dim

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""
        return self.entries.value_dim

    @property
    def nbytes(self) -> int:
        """Bytes of the entries of all contexts."""
        return self.entries.nbytes

    def contexts(self) -> Iterator[tuple[Entries, list[int]]]:
        """Each context that some row sees: views of its entries, and those rows."""
        H = self.kv_heads
        for p in sorted(set(self.rows)):
            seen_by = [b for b, context in enumerate(self.rows) if context == p]
            yield _heads(self.entries, p * H, (p + 1) * H), seen_by

    def select(self, rows: Sequence[int]) -> BatchedPrefix:
        """A batch of rows of this one, in that order; the entries are shared."""
        return BatchedPrefix(self.entries, self.kv_heads, tuple(self.rows[b] for b in rows))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BatchedPrefix:
        """The same on another device; numbers, not codes, in `dtype`."""
        return BatchedPrefix(self.entries.to(device, dtype), self.kv_heads, self.rows)


def appended(parts: Sequence[Entries], dtype: torch.dtype) -> Entries:
    """Entries of contexts that follow each other in one sequence: head `h` has those of all parts.

    Parts that are stored in different ways become numbers in `dtype`. Raises ValueError for parts
    of different shapes.
    """
    if len({(len(part.lengths), part.key_dim, part.value_dim) for part in parts}) != 1:
        raise ValueError("contexts of one model have as many heads and numbers a key and value")
    if len({_kind(part) for part in parts}) != 1:
        parts = [part.unpack().to(device_of(part), dtype) for part in parts]
    flat, H = _concatenate(parts), len(parts[0].lengths)
    order = torch.cat(
        [
            torch.arange(flat.offsets[h + p * H], flat.offsets[h + p * H + 1])
            for h in range(H)
            for p in range(len(parts))
        ]
    ).to(device_of(flat))
    return _rows(flat, order, tuple(sum(flat.lengths[h::H]) for h in range(H)))


def device_of(entries: Entries) -> torch.device:
    """Where the entries are."""
    keys = entries.keys
    return keys.codes.device if isinstance(keys, Packed) else keys.device


def _kind(part: Entries) -> tuple[object, ...]:
    keys, values = part.keys, part.values
    dtypes: tuple[object, ...]
    if isinstance(keys, Packed) and isinstance(values, Packed):
        dtypes = (keys.codes.dtype, values.codes.dtype, keys.rotated, keys.codes.device)
    else:
        dtypes = (keys.dtype, values.dtype, keys.device)  # type: ignore[union-attr]
    return (*dtypes, len(part.lengths), part.key_dim, part.value_dim)


def _concatenate(parts: Sequence[Entries]) -> Entries:
    """One flat buffer; a single part as it is. A beta is zero where only other parts have one."""
    if len(parts) == 1:
        return parts[0]
    beta = None
    if any(part.beta is not None for part in parts):
        beta = torch.cat([_beta(part) for part in parts])
    lengths = tuple(t for part in parts for t in part.lengths)
    numbers = [part for part in parts if isinstance(part, RaggedHeads)]
    if numbers:
        keys, values = [x.keys for x in numbers], [x.values for x in numbers]
        return RaggedHeads(torch.cat(keys), torch.cat(values), beta, lengths)
    codes = [part for part in parts if isinstance(part, QuantizedHeads)]
    return QuantizedHeads(
        _stack([x.keys for x in codes]), _stack([x.values for x in codes]), beta, lengths
    )


def _stack(parts: Sequence[Packed]) -> Packed:
    codes = torch.cat([part.codes for part in parts])
    return Packed(codes, torch.cat([part.scale for part in parts]), parts[0].rotated)


def _beta(part: Entries) -> torch.Tensor:
    """`[N]` float32."""
    if part.beta is not None:
        return part.beta
    return torch.zeros(sum(part.lengths), device=device_of(part))


def _heads(entries: Entries, first: int, last: int) -> Entries:
    """Views of the heads `first` to `last`."""
    rows = slice(entries.offsets[first], entries.offsets[last])
    return _rows(entries, rows, entries.lengths[first:last])


def _rows(entries: Entries, which: slice | torch.Tensor, lengths: tuple[int, ...]) -> Entries:
    """Some rows of all tensors, which are those of heads of these `lengths`."""
    beta = None if entries.beta is None else entries.beta[which]
    if isinstance(entries, RaggedHeads):
        return RaggedHeads(entries.keys[which], entries.values[which], beta, lengths)
    return QuantizedHeads(entries.keys.rows(which), entries.values.rows(which), beta, lengths)
