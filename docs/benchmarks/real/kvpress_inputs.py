"""Writes the tokens that amkv feeds a model, so that kvpress is measured on the very same ones.

    python docs/benchmarks/real/kvpress_inputs.py --model FOLDER --data FILE [FILE ...] --out OUT
        [--teacher N]

Runs in amkv's environment; `kvpress_real.py` reads the file in kvpress's. FILE has one document a
line: `name`, `text`, and `questions` with `question` and `answer`. OUT has token ids, from which
the texts can be read again: keep it where the documents are kept, and out of the repository.
`--teacher` adds what amkv itself says of the whole context of the N shortest documents, for the
other side to check its forcing against.
"""

from __future__ import annotations

import argparse
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from amcli import __version__
from amcli.evaluation import makers
from amcli.evaluation.forcing import tokenize
from amcli.evaluation.suites.base import Question
from amcli.models.loading import LoadedModel, load
from amcli.models.template import ChatTemplate
from amcli.pipeline.contexts import reading
from amcli.pipeline.contexts.forcing import Limits, Teacher
from amcli.pipeline.contexts.source import Source


def end_token(chat: ChatTemplate) -> int:
    """The token that ends an answer, chosen as `amcli.pipeline.contexts.forcing.end_token` does."""
    first = chat.next_turn("?")[0]
    return first if first in chat.stop_ids else min(chat.stop_ids)


def document(given: dict[str, Any], chat: ChatTemplate) -> dict[str, Any]:
    """One document as ids. `prefix` is how many of `context_ids` come before its own text."""
    opened = chat.open_document(given["text"])
    return {
        "name_sha256": sha256(given["name"].encode()).hexdigest(),
        "text_sha256": sha256(given["text"].encode()).hexdigest(),
        "context_ids": opened.ids,
        "prefix": opened.document_start,
        "questions": [
            {
                "prompt_ids": chat.first_turn(question["question"]),
                "target_ids": [*chat.answer_ids(question["answer"]), end_token(chat)],
            }
            for question in given["questions"]
        ],
    }


def whole(loaded: LoadedModel, given: dict[str, Any], made: dict[str, Any]) -> list[float]:
    """Summed nats of each right answer after the whole document, by amkv's own forcing.

    Raises ValueError where this file has other tokens than that forcing.
    """
    asked = [Question(q["question"], q["answer"], "") for q in given["questions"]]
    forced = [tokenize(loaded, question) for question in asked]
    context = reading.prefill(loaded, Source(given["name"], given["text"]))
    ids = [(question.prompt, question.targets) for question in forced]
    if ids != [(q["prompt_ids"], q["target_ids"]) for q in made["questions"]]:
        raise ValueError("amkv would force other tokens than the ones written here")
    cache = makers.whole(context).cache
    teacher = Teacher(loaded, forced, cache, Limits.of(loaded.device))
    return [outcome.nll for outcome in teacher.measure(cache)]


def main() -> None:
    """Command line: model, documents, and the file to write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="documents, JSON Lines")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--teacher", type=int, default=0, metavar="N", help="documents to check")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    generation = GenerationConfig.from_pretrained(args.model)
    chat = ChatTemplate(tokenizer, generation.eos_token_id)
    if chat.raw:
        parser.error("this model has no chat template, so an answer has no end to force")
    lines = [line for path in args.data for line in path.read_text(encoding="utf-8").splitlines()]
    given = [json.loads(line) for line in lines if line.strip()]
    made = [document(item, chat) for item in given]
    if args.teacher:
        loaded = load(str(args.model), device="cpu", dtype="float32")
        shortest = sorted(range(len(made)), key=lambda i: len(made[i]["context_ids"]))
        for i in shortest[: args.teacher]:
            made[i]["amkv_nll"] = whole(loaded, given[i], made[i])
    result = {
        "made_by": f"amkv {__version__}",
        "config_sha256": sha256((args.model / "config.json").read_bytes()).hexdigest(),
        "empty_context_ids": chat.open_document("").ids,
        "stop_ids": sorted(chat.stop_ids),
        "documents": made,
    }
    args.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
