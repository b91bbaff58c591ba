"""Measures pocket's recall: `python -m amcli.trainer.evaluate`.

Documents come from seeds that training never saw. Every question is asked on its own, right after
its document, and is right if the whole greedy answer equals the only right one, word for word.
The same questions are then asked with an empty document in its place: what the model guesses.
Runs through the same prefill and sessions as the command line does.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer

from amcli.generator.dialogues import QUESTION_KINDS, Question, Questioner
from amcli.generator.documents import generate
from amcli.generator.tokens import Sampler
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.talk.session import Session
from amcli.pocket import folder
from amcli.system.versions import tools

LENGTHS = (1024, 4096, 8192)
MAX_TOKENS = 48
"""More tokens than the longest right answer has."""


@dataclass
class Score:
    """Right answers of one kind at one length, with and without the document."""

    asked: int = 0
    right: int = 0
    guessed: int = 0

    def row(self) -> dict[str, int | float]:
        """The counts, and their shares of the questions asked."""
        asked = max(1, self.asked)
        return {
            "asked": self.asked,
            "right": self.right,
            "recall": round(self.right / asked, 4),
            "right_without_document": self.guessed,
            "recall_without_document": round(self.guessed / asked, 4),
        }


@dataclass
class Measured:
    """Results at one length: tokens of each document, scores by kind, and every wrong answer."""

    tokens: list[int]
    scores: dict[str, Score]
    wrong: list[dict[str, str]]


def answers(context: Context, questions: Sequence[Question]) -> Iterator[str]:
    """The whole greedy answer to each question, asked alone right after the context."""
    session = Session(context, max_tokens=MAX_TOKENS)
    for question in questions:
        session.reset()
        yield "".join(session.ask(question.question))


def draw(text_tokens: int, index: int, sampler: Sampler, count: int) -> tuple[str, list[Question]]:
    """Document `index`, at most `text_tokens` tokens, with up to `count` questions of each kind."""
    seed = f"eval/pocket/{text_tokens}/{index}"
    document = generate(seed, text_tokens, sampler.measure, len(sampler.blank))
    questioner, rng = Questioner(document), Random(f"{seed}/questions")
    return document.text, [
        q for kind in QUESTION_KINDS for q in questioner.distinct(rng, kind, count)
    ]


def evaluate(loaded: LoadedModel, length: int, documents: int, count: int) -> Measured:
    """Asks up to `count` questions of each kind about each of `documents` documents."""
    sampler = Sampler(Tokenizer.from_file(str(folder() / "tokenizer.json")))
    found = Measured([], {kind: Score() for kind in QUESTION_KINDS}, [])
    nothing = prefill(loaded, Source("nothing", ""))
    for index in range(documents):
        text, questions = draw(length, index, sampler, count)
        context = prefill(loaded, Source(f"document {index}", text))
        found.tokens.append(len(context.document))
        said = answers(context, questions)
        guesses = answers(nothing, questions)
        for question, answer, guess in zip(questions, said, guesses, strict=True):
            score = found.scores[question.kind]
            score.asked += 1
            score.right += answer == question.answer
            score.guessed += guess == question.answer
            if answer != question.answer:
                found.wrong.append({**asdict(question), "said": answer})
    return found


def circumstances(loaded: LoadedModel) -> dict[str, Any]:
    """The date, hardware and software of the measurement."""
    on_gpu = loaded.device.type == "cuda"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name(loaded.device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "versions": tools(),
        "weights_sha256": sha256((folder() / "model.safetensors").read_bytes()).hexdigest(),
        "seeds": "eval/pocket/{tokens}/{document}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(prog="python -m amcli.trainer.evaluate", description=__doc__)
    parser.add_argument("--documents", type=int, default=20, help="documents of each length")
    parser.add_argument("--questions", type=int, default=10, help="of each kind and document")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="in tokens")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    loaded = load("pocket")
    results, wrong = [], []
    for length in args.lengths:
        started = time.monotonic()
        found = evaluate(loaded, length, args.documents, args.questions)
        mean = round(sum(found.tokens) / max(1, len(found.tokens)))
        for kind, score in found.scores.items():
            row = {"tokens": length, "mean_tokens": mean, "kind": kind, **score.row()}
            print(json.dumps(row), flush=True)
            results.append(row)
        wrong += [{"tokens": length, **miss} for miss in found.wrong]
        print(f"{length} tokens: {time.monotonic() - started:.0f} s", flush=True)
    if args.json:
        report = {
            **circumstances(loaded),
            "documents": args.documents,
            "questions": args.questions,
            "results": results,
            "wrong": wrong,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
