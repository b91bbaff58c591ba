"""Entries of one layer, stored head after head with no padding.

The one data structure that the maths (`matching`), the runtime (`models`) and the file
(`artifacts`) share. Knows torch; knows nothing of models, files or methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True)
class RaggedHeads:
    """`(C_k, beta, C_v)` of every KV head of one layer, flat: head `h` owns `lengths[h]` rows.

    keys     `[N, d]`, post-RoPE, in the model's dtype; `N = sum(lengths)`
    values   `[N, dv]`, same dtype and device as keys
    beta     `[N]` float32, added to the scaled logit of its key; None means all zero
    lengths  one int per KV head, >= 0, in head order

    Raises ValueError when shapes or dtypes disagree.
    """

    keys: torch.Tensor
    values: torch.Tensor
    beta: torch.Tensor | None
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        rows = sum(self.lengths)
        if self.keys.ndim != 2 or self.values.ndim != 2:
            raise ValueError("keys and values of ragged heads are 2-D: [sum of lengths, head dim]")
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

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each head, and the total at the end: `len(lengths) + 1` ints."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def key_dim(self) -> int:
        """Numbers of a key."""
        return self.keys.shape[1]

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors: what the entries cost in memory and on disk."""
        tensors = (self.keys, self.values) + (() if self.beta is None else (self.beta,))
        return sum(t.numel() * t.element_size() for t in tensors)

    def heads(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Views `(keys [t_h, d], values [t_h, dv], beta [t_h] or None)` in head order."""
        for start, length in zip(self.offsets, self.lengths, strict=False):
            rows = slice(start, start + length)
            yield self.keys[rows], self.values[rows], None if self.beta is None else self.beta[rows]

    @property
    def rotated(self) -> bool:
        """Never; see `quantize.QuantizedHeads`."""
        return False

    def unpack(self) -> RaggedHeads:
        """The entries as numbers, which they are; see `quantize.QuantizedHeads`."""
        return self

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> RaggedHeads:
        """The same entries on another device, keys and values in `dtype`; beta stays float32."""
        return RaggedHeads(
            self.keys.to(device=device, dtype=dtype),
            self.values.to(device=device, dtype=dtype),
            None if self.beta is None else self.beta.to(device=device),
            self.lengths,
        )

    @classmethod
    def dense(cls, keys: torch.Tensor, values: torch.Tensor) -> RaggedHeads:
        """Every head with all its keys: `keys [H, n, d]`, `values [H, n, dv]`, no beta."""
        H, n, d = keys.shape
        return cls(keys.reshape(H * n, d), values.reshape(H * n, values.shape[2]), None, (n,) * H)
