"""A compacted context, ready to be used or to be written as an artifact."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from amcli.entries.ragged import Entries
from amcli.pipeline.compaction import budget_file
from amcli.pipeline.compaction.choices import Rounding
from amcli.pipeline.compaction.heldout import Errors
from amcli.pipeline.compaction.plan import Plan
from amcli.pipeline.contexts.context import Context, full_layers, put
from amcli.pipeline.contexts.source import bare_name
from amcli.pipeline.queries.self_study import TEMPERATURE
from amcli.storage.artifacts import NewArtifact, complete, stores_recorded


@dataclass(frozen=True)
class Probe:
    """One ratio that was tried: as asked for, as reached, the stored bytes, and `agreement`, the
    fidelity that was measured."""

    ratio: float
    real_ratio: float
    stored_bytes: int
    agreement: float

    def record(self) -> dict[str, float | int]:
        """The probe as JSON."""
        return {
            "ratio": self.ratio,
            "real_ratio": round(self.real_ratio, 4),
            "stored_bytes": self.stored_bytes,
            "agreement": self.agreement,
        }


@dataclass(frozen=True)
class Reached:
    """The fidelity a search was asked for, and what it found on how many held-out tokens.

    Manifests and programs know the fidelity that was found as `agreement`.
    """

    asked: float
    agreement: float
    tokens: int
    probes: tuple[Probe, ...]

    def record(self) -> dict[str, Any]:
        """The search as JSON, for manifests and programs."""
        return {
            "asked": self.asked,
            "agreement": self.agreement,
            "tokens": self.tokens,
            "probes": [probe.record() for probe in self.probes],
        }


@dataclass
class Compaction:
    """A plan carried out on a context.

    layers       entries of every layer; of a sliding layer, its raw tail
    query_count  reference queries per KV head that the fits may use
    asked        questions that the model asked itself to make them
    seconds      time taken by each stage
    errors       of the stored entries, on held-out queries; None: not measured
    rounding     what a store that the user named does to the worst layer, if it rounds
    fidelity     what a search for the ratio found, if there was one
    positions    for each compacted layer, the token each entry was taken from, `[N]` int32, to be
                 stored; empty: not asked for
    """

    context: Context
    plan: Plan
    layers: list[Entries]
    query_count: int
    asked: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    errors: Errors | None = None
    rounding: Rounding | None = None
    fidelity: Reached | None = None
    positions: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def full_bytes(self) -> int:
        """Bytes of the uncompacted keys and values of the compacted layers."""
        return self.plan.full_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes stored for the compacted layers, scales, biases and positions included."""
        places = sum(x.nbytes for x in self.positions.values())
        return places + sum(self.layers[i].nbytes for i in full_layers(self.context))

    @property
    def ratio(self) -> float:
        """Full over stored bytes of the compacted layers; 1 for a model without any."""
        return self.full_bytes / self.stored_bytes if self.stored_bytes else 1.0

    @property
    def whole_ratio(self) -> float:
        """Full over stored bytes of all that the model keeps, sliding windows and states included;
        the same as `ratio` for a model without either."""
        size, full = self.context.loaded.dtype.itemsize, full_layers(self.context)
        tails = [heads for i, heads in enumerate(self.layers) if i not in full]
        states = sum(x.nbytes for x in self.context.cache.get_states().values())
        numbers = sum(sum(x.lengths) * (x.key_dim + x.value_dim) for x in tails)
        stored = self.stored_bytes + states + sum(x.nbytes for x in tails)
        return (self.full_bytes + states + numbers * size) / stored if stored else 1.0

    def apply(self) -> None:
        """Puts the compact entries into the context's cache in place of the full ones."""
        put(self.context, self.context.cache, self.layers)

    @property
    def requested(self) -> dict[str, float | int]:
        """What was asked for; with a fidelity, the ratio is the one found."""
        requested = dict(self.plan.size)
        if self.fidelity is not None:
            requested["fidelity"] = self.fidelity.asked
        return requested

    def save(self, path: Path, overwrite: bool) -> dict[str, Any]:
        """Writes the artifact of kind `compact`; returns its manifest."""
        with NewArtifact(path, overwrite) as new:
            return self.finish(new)

    def finish(self, new: NewArtifact) -> dict[str, Any]:
        """The same as `save`, for an artifact already begun; see `compacting.compact`."""
        plan = self.plan
        budget: dict[str, Any] = {"name": plan.budget}
        if plan.file is not None:
            budget |= {"file": bare_name(plan.file.path), "sha256": plan.file.sha256}
        manifest = {
            **self.context.manifest(),
            "kind": "compact",
            "stored": [list(heads.lengths) for heads in self.layers],
            **stores_recorded(self.layers, full_layers(self.context)),
            "method": {"name": plan.method.name},
            "budget": budget,
            "requested": self.requested,
            "seed": plan.seed,
            "queries": {"source": plan.queries.name, "count": self.query_count},
        }
        if self.asked:
            manifest["queries"] |= {"asked": self.asked, "temperature": TEMPERATURE}
        if self.errors is not None:
            manifest |= self.errors.record()
            manifest["queries"]["held_out"] = self.errors.count
        if self.fidelity is not None:
            manifest["fidelity"] = self.fidelity.record()
        ids, states = self.context.ids, self.context.cache.get_states()
        return self.context.loaded.shard.once(
            lambda: complete(new, manifest, ids, self.layers, states, self.positions)
        )

    def save_budget(self, path: Path, overwrite: bool) -> None:
        """Writes a budget file of how the entries were shared out; see `budget_file.write`."""
        model, plan = self.context.loaded.fingerprint()["model"], self.plan
        about = {
            "model": {k: model[k] for k in ("id", "revision", "architecture", "config_hash")},
            "method": plan.method.name,
            "budget": plan.budget,
            "queries": plan.queries.name,
            "seed": plan.seed,
            "ratio": round(self.ratio, 4),
            "tokens": self.context.T,
            "source": self.context.source,
        }
        lengths = {i: list(self.layers[i].lengths) for i in full_layers(self.context)}
        self.context.loaded.shard.once(
            lambda: budget_file.write(path, lengths, about, overwrite=overwrite)
        )
