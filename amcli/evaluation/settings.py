"""What an evaluation is asked to do, checked before any work starts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amcli.errors import UsageError
from amcli.evaluation import makers
from amcli.evaluation.suites.base import Measure, Scorer, Suite, Wanted
from amcli.models.loading import LoadedModel
from amcli.pipeline.compaction.budget_file import BudgetFile
from amcli.pipeline.compaction.request import Request, budget_named


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    methods                   each with the ratios it is measured at
    docs, tokens, questions   see `suites.base.Wanted`; None: the suite's own
    asked                     a file of questions about the text at `path`
    budget, queries           see `compaction.request.Request`; None: the method's own
    store                     how every method's entries are stored; None: the method's own
    """

    suite: Suite
    methods: tuple[tuple[str, tuple[float, ...]], ...]
    path: Path | None = None
    asked: Path | None = None
    docs: int | None = None
    questions: int | None = None
    tokens: int | None = None
    seed: int = 0
    budget: str | BudgetFile | None = None
    queries: str | None = None
    reason: bool = False
    store: str | None = None

    @classmethod
    def of(
        cls,
        suite: Suite,
        names: Sequence[str],
        ratios: Sequence[float],
        budget: str | None = None,
        **more: Any,
    ) -> Settings:
        """Checked settings. Raises UsageError for what makes no sense."""
        found = dict.fromkeys(name for given in names for name in makers.expanded(given))
        pairs = tuple((name, tuple(makers.ratios(name, ratios))) for name in found)
        settings = cls(suite, pairs, budget=budget_named(budget), **more)
        for name, wanted in pairs:
            for ratio in wanted:
                makers.require(settings.cell(name, ratio))
        if suite.file is None and settings.path is not None:
            raise UsageError(
                f"suite {suite.name} takes no file",
                f"leave {settings.path} out",
                code="suite-without-file",
                field="path",
                suite=suite.name,
            )
        if suite.file is not None and settings.path is None:
            raise UsageError(
                f"suite {suite.name} wants a file: {suite.file}",
                f"name it; suite {suite.name} makes no documents of its own",
                code="suite-wants-documents" if suite.own else "suite-wants-file",
                field="path",
                suite=suite.name,
            )
        if settings.asked is not None and not suite.own:
            raise UsageError(
                f"suite {suite.name} takes no file of questions",
                "take the suite qa, or a number of questions",
                code="suite-without-own-questions",
                field="asked",
                suite=suite.name,
                asked=settings.asked,
            )
        if suite.whole and settings.tokens is not None:
            raise UsageError(
                f"suite {suite.name} reads whole documents",
                "leave tokens out",
                code="suite-of-whole-documents",
                field="tokens",
                suite=suite.name,
            )
        if settings.reason and not suite.choice:
            raise UsageError(
                f"suite {suite.name} has no multiple choice",
                "leave reason out",
                code="suite-without-choice",
                field="reason",
                suite=suite.name,
            )
        return settings

    def cell(self, method: str, ratio: float) -> Request:
        """The request to `compact` for one cell."""
        return Request(
            ratio=ratio,
            method=method,
            budget=self.budget,
            queries=self.queries,
            seed=self.seed,
            store=self.store,
        )

    @property
    def scorer(self) -> Scorer:
        """The suite's scorer, or the one for answers after a thought."""
        return "reasoned" if self.reason else self.suite.scorer

    def wanted(self, measure: Measure) -> Wanted:
        """What the suite is asked to make."""
        return Wanted(
            docs=self.suite.docs if self.docs is None else self.docs,
            questions=self.questions,
            tokens=self.suite.tokens if self.tokens is None else self.tokens,
            seed=self.seed,
            measure=measure,
            path=self.path,
            asked=self.asked,
            reason=self.reason,
        )

    def record(self, loaded: LoadedModel) -> dict[str, Any]:
        """Everything the numbers depend on."""
        file = self.budget if isinstance(self.budget, BudgetFile) else None
        wanted = self.wanted(Measure(lambda texts: []))
        model = loaded.fingerprint()
        return {
            "model": loaded.id,
            "revision": loaded.revision,
            "config_hash": model["model"]["config_hash"],
            "tokenizer_hash": model["tokenizer"]["hash"],
            "template_hash": model["tokenizer"]["template_hash"],
            "device": loaded.device.type,
            "dtype": model["model"]["dtype"],
            "suite": self.suite.name,
            "scorer": self.scorer,
            "file": None if self.path is None else self.path.name,
            "file_sha256": None if self.path is None else sha256(self.path.read_bytes()),
            "asked_sha256": None if self.asked is None else sha256(self.asked.read_bytes()),
            "docs": wanted.docs,
            "questions": wanted.questions,
            "tokens": wanted.tokens,
            "seed": self.seed,
            "budget": self.budget if file is None else str(file.path),
            "queries": self.queries,
            "store": self.store,
            "methods": [[name, list(ratios)] for name, ratios in self.methods],
        }


def sha256(data: bytes) -> str:
    """The hash of a file or a text, as in the results."""
    return hashlib.sha256(data).hexdigest()
