"""Which of the live tokens each query sees, and in what tiles that is worked through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

MAX_SCORES = 64 * 2**20
"""Score elements a tile may hold: 256 MiB in float32."""

CPU_SCORES = 2**20
"""The same on a CPU, which is a quarter faster when scores stay in its caches."""

_TILE_ROWS = 1024
"""Most rows of a tile: few enough that causal and windowed tiles skip most unseen columns."""


@dataclass(frozen=True)
class Tile:
    """Some of the rows, and the columns they may see."""

    rows: slice
    columns: slice


@dataclass(frozen=True)
class Seen:
    """Which of `n` live columns each of `m` rows sees: causal, windowed, not padded.

    at  `[m]` int64, the columns of the rows themselves, where only the device knows them; what is
        right of them is spare room. None: the last `m` columns. Not together with `live`
    """

    m: int
    n: int
    window: int | None
    live: torch.Tensor | None
    at: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing but the order of the tokens matters."""
        return self.window is None and self.live is None and self.at is None

    def tiles(
        self, device: torch.device, scores_per_row_and_column: int, extra_columns: int = 0
    ) -> Iterator[Tile]:
        """Row tiles small enough for the device, each with the columns it can see at all."""
        columns = self.n if self.window is None else min(self.n, self.window + _TILE_ROWS)
        a_row = max(1, scores_per_row_and_column * (columns + extra_columns))
        room = min(MAX_SCORES, CPU_SCORES) if device.type == "cpu" else MAX_SCORES
        step = max(1, min(_TILE_ROWS, room // a_row))
        for start in range(0, self.m, step):
            stop = min(start + step, self.m)
            if self.at is not None:
                yield Tile(slice(start, stop), slice(0, self.n))
                continue
            first_query = self.n - self.m + start
            low = 0 if self.window is None else max(0, first_query - self.window + 1)
            yield Tile(slice(start, stop), slice(low, self.n - self.m + stop))

    def mask(self, tile: Tile, device: torch.device) -> torch.Tensor | None:
        """`[B or 1, rows, columns]` bool, True where seen; None when all of it is seen."""
        rows, columns = tile.rows, tile.columns
        if rows.stop - rows.start == 1 and self.live is None and self.at is None:
            return None
        if self.at is None:
            offset = self.n - self.m
            i = torch.arange(rows.start + offset, rows.stop + offset, device=device)[:, None]
        else:
            i = self.at[rows, None]
        j = torch.arange(columns.start, columns.stop, device=device)
        seen = (j <= i)[None]
        if self.window is not None:
            seen = seen & (j > i - self.window)
        if self.live is not None:
            # Padding sees itself: a row that sees nothing is NaN, and 0 * NaN would reach others.
            seen = seen & (self.live[:, None, columns] | (j == i))
        return seen
