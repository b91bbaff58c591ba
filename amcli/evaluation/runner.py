"""Runs a suite: prefill each document once, make each context once, ask all questions of it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch

from amcli.errors import UsageError
from amcli.evaluation import makers, scorers
from amcli.evaluation.forcing import as_replied, tokenize
from amcli.evaluation.makers import FULL, NONE, Made
from amcli.evaluation.results import Results, finite
from amcli.evaluation.settings import Settings, sha256
from amcli.evaluation.suites.base import Document, Measure, Question
from amcli.models.loading import LoadedModel
from amcli.models.replies import Reply, answers, replies
from amcli.pipeline.contexts import reading
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.forcing import Forced, Limits, Outcome, Teacher
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.queries.passes import Passes
from amcli.system.clock import stopwatch
from amcli.system.progress import Progress
from amcli.system.versions import tools


class Listener(Progress, Protocol):
    """Is told of every document and cell, as well as the stages of the work."""

    def document(self, index: int, name: str, tokens: int) -> None:
        """Work on a document begins."""

    def cell(self, results: Results, method: str, ratio: float | None) -> None:
        """A cell has been added to the results."""


def measure_of(loaded: LoadedModel) -> Measure:
    """Lengths in the model's own tokens."""

    def count(texts: Sequence[str]) -> list[int]:
        ids = loaded.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [len(row) for row in ids]

    return Measure(count)


def prepare(settings: Settings, loaded: LoadedModel) -> tuple[list[Document], Results]:
    """Makes the documents, and the empty results of a run.

    Raises UsageError when a document with its questions does not fit the model's positions, or a
    ratio does not fit a document.
    """
    documents = settings.suite.documents(settings.wanted(measure_of(loaded)))
    entries = []
    for document in documents:
        tokens = len(loaded.chat.open_document(document.text).ids)
        _require_room(settings, loaded, document, tokens)
        for name, ratios in settings.methods:
            for ratio in ratios:
                makers.require(settings.cell(name, ratio), tokens)
        digest = sha256(document.text.encode())
        entries.append({"name": document.name, "tokens": tokens, "sha256": digest, "seconds": {}})
    results = Results(
        settings=settings.record(loaded),
        hardware=hardware(loaded.device),
        tools=tools(),
        documents=entries,
        questions=[[question.kind for question in d.questions] for d in documents],
    )
    return documents, results


def _require_room(settings: Settings, loaded: LoadedModel, document: Document, tokens: int) -> None:
    limit = loaded.geometry.max_positions
    if limit is None:
        return
    generates = settings.scorer in scorers.GENERATING
    for question in document.questions:
        need = tokens + (tokenize(loaded, question).length if question.answer else 0)
        if generates or settings.suite.own:
            asked = loaded.chat.first_turn(question.said or question.text)
            need = max(need, tokens + len(asked) + question.max_tokens)
        if need > limit:
            raise UsageError(
                f"{document.name} with a question and its answer takes {need:,} tokens, and "
                f"{loaded.id} has {limit:,} positions",
                "lower tokens, or choose a model with a longer context",
                code="tokens-too-many",
                field="tokens",
                tokens=need,
                limit=limit,
            )


def hardware(device: torch.device) -> str:
    """The hardware of a run, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}"


def run(
    settings: Settings,
    loaded: LoadedModel,
    documents: Sequence[Document],
    results: Results,
    listener: Listener,
    save: Callable[[], None],
) -> None:
    """Measures the cells missing from `results`; `save` is called after each."""
    if loaded.device.type == "cuda" and documents:
        # Compilation and look-ups at the first call must not count as a document's time.
        reading.prefill(loaded, Source("", documents[0].text))
    for index in range(len(documents)):
        # In a function of its own, so a document's caches are freed before the next one's exist.
        measure(settings, loaded, documents, index, results, listener, save)


def measure(
    settings: Settings,
    loaded: LoadedModel,
    documents: Sequence[Document],
    index: int,
    results: Results,
    listener: Listener,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Measures the cells of one document missing from `results`."""
    document, todo = documents[index], results.todo(index)
    if not todo:
        return
    listener.document(index, document.name, results.documents[index]["tokens"])
    bench = _Bench.of(settings, loaded, document, listener)
    results.documents[index]["seconds"] = {"prefill": round(bench.prefill, 3)}
    for method, ratio in todo:
        found = bench.cell(method, ratio)
        cell = {"document": index, "method": method, "ratio": ratio, **found}
        results.cells[index, method, ratio] = cell
        listener.cell(results, method, ratio)
        save()


@dataclass
class _Bench:
    """One document in a model, and what measures it.

    teacher  forces the right answer to each question and then, if the suite asks for them, each of
             the whole document's `own` answers
    """

    settings: Settings
    document: Document
    context: Context
    teacher: Teacher
    full: Made
    own: list[Reply]
    passes: Passes
    prefill: float
    listener: Listener

    @classmethod
    def of(
        cls, settings: Settings, loaded: LoadedModel, document: Document, listener: Listener
    ) -> _Bench:
        """Prefills the document and lets the full context answer: it is the reference."""
        began = stopwatch(loaded.device)
        context = reading.prefill(loaded, Source(document.name, document.text), progress=listener)
        seconds = stopwatch(loaded.device) - began
        full = makers.whole(context)
        own: list[Reply] = []
        if settings.suite.own:
            listener.start("answers", 0)
            own = replies(loaded, full.cache, *_prompts(loaded, document.questions))
            document = _answered(document, own)
        forced: list[Forced] = [tokenize(loaded, question) for question in document.questions]
        for question, reply in zip(document.questions, own, strict=False):
            forced.append(as_replied(loaded, question, reply))
        teacher = Teacher(loaded, forced, full.cache, Limits.of(loaded.device))
        teacher.measure(full.cache)
        passes = Passes(context)
        return cls(settings, document, context, teacher, full, own, passes, seconds, listener)

    def cell(self, method: str, ratio: float | None) -> dict[str, Any]:
        """The result of one method at one ratio, as stored in the results file."""
        made = self.made(method, ratio)
        self.listener.start("questions", 0)
        began = stopwatch(self.context.loaded.device)
        measured = self.ask(made)
        asking = stopwatch(self.context.loaded.device) - began
        seconds = {**made.seconds, "questions": asking}
        found = {
            "budget": made.budget,
            "stored_bytes": made.stored_bytes,
            "full_bytes": made.full_bytes,
            "output_error": None if made.output_error is None else round(made.output_error, 6),
            **measured,
            "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
        }
        return cast(dict[str, Any], finite(found))

    def made(self, method: str, ratio: float | None) -> Made:
        """The context of one cell."""
        if method == FULL:
            return self.full
        if method == NONE:
            return makers.nothing(self.context.loaded, self.full.full_bytes)
        request = self.settings.cell(method, float(ratio or 1))
        return makers.make(self.context, request, self.passes, self.listener)

    def ask(self, made: Made) -> dict[str, list[list[float | None]]]:
        """Asks all questions of the document: `outcomes`, and `own` and `said` if asked for."""
        questions, scorer = self.document.questions, self.settings.scorer
        measured = self.teacher.measure(made.cache)
        outcomes, own = measured[: len(questions)], measured[len(questions) :]
        said: Sequence[str | None] = [None] * len(questions)
        if scorer in scorers.GENERATING:
            loaded = self.context.loaded
            said = answers(loaded, made.cache, *_prompts(loaded, questions))
        scores = [
            scorers.score(scorer, question, outcome, text)
            for question, outcome, text in zip(questions, outcomes, said, strict=True)
        ]
        found = {"outcomes": list(map(cell_of, scores, outcomes))}
        if own:
            texts = self._said(made, own)
            same = [float(text == reply.text) for text, reply in zip(texts, self.own, strict=True)]
            found["own"] = list(map(cell_of, same, own))
            found["said"] = [
                [round(scorers.f1(text, q.answer), 6), scorers.contains(text, q.answer)]
                for text, q in zip(texts, questions, strict=True)
            ]
        return found

    def _said(self, made: Made, own: Sequence[Outcome]) -> list[str]:
        """What the model answers with this context.

        If forcing reproduces the whole document's own answer, it need not be generated. In 16 bits
        forcing, which reads many tokens at once, may tip a near tie that decoding would not.
        """
        said = [reply.text for reply in self.own]
        whole = made is self.full
        others = [i for i, outcome in enumerate(own) if not (outcome.exact or whole)]
        if others:
            loaded = self.context.loaded
            asked = _prompts(loaded, [self.document.questions[i] for i in others])
            for i, text in zip(others, answers(loaded, made.cache, *asked), strict=True):
                said[i] = text
        return said


def _prompts(
    loaded: LoadedModel, questions: Sequence[Question]
) -> tuple[list[list[int]], list[int]]:
    """The prompts of questions whose answers are generated, and the longest answer to each."""
    prompts = [loaded.chat.first_turn(q.said or q.text) for q in questions]
    return prompts, [q.max_tokens for q in questions]


def _answered(document: Document, own: Sequence[Reply]) -> Document:
    """The same document, with its own answer for each question that has none."""
    questions = [
        question if question.answer else replace(question, answer=reply.text)
        for question, reply in zip(document.questions, own, strict=True)
    ]
    return replace(document, questions=tuple(questions))


def cell_of(score: float | None, outcome: Outcome) -> list[float | None]:
    """The cell's numbers, rounded so that rows are the same from memory and from the file."""
    return [
        None if score is None else round(score, 6),
        round(outcome.nll, 6),
        round(outcome.kl, 8),
        outcome.agree,
        outcome.tokens,
    ]
