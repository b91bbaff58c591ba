"""How long-running work reports its progress, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives stages of work: `start` opens a stage of `total` units, `advance` moves it on."""

    def start(self, stage: str, total: int) -> None:
        """A new stage begins; the one before is done."""

    def advance(self, units: int = 1) -> None:
        """Some units of the current stage are done."""


class Silent:
    """A `Progress` that reports nothing."""

    def start(self, stage: str, total: int) -> None:
        """Nothing."""

    def advance(self, units: int = 1) -> None:
        """Nothing."""


SILENT = Silent()
