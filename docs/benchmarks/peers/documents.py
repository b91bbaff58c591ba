"""Writes the documents and questions that the peers are asked about, with pocket's own generator.

    python docs/benchmarks/peers/documents.py --out FILE [--lengths 2048 8192] [--documents 3]
        [--questions 20]

Runs in amkv's environment; `kvpress_recall.py` reads the file in another one. The ids stand in the
file beside the text, so that the other side can prove that it feeds the very same tokens.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from amcli import __version__
from amcli.generator.tokens import END, Sampler, special_id
from amcli.models.template import ChatTemplate
from amcli.pocket import folder
from amcli.trainer.evaluate import draw


def document(length: int, index: int, count: int, sampler: Sampler, chat: ChatTemplate) -> Any:
    """Document `index` of at most `length` tokens, its questions, and the ids of each piece.

    `context_ids` ends with the document, `ids` of a question is all from there to the answer,
    `answer_ids` includes the token that ends the turn.
    """
    text, questions = draw(length, index, sampler, count)
    end = special_id(sampler.tokenizer, END)
    return {
        "seed": f"eval/pocket/{length}/{index}",
        "length": length,
        "tokens": len(sampler.encode(text)),
        "sha256": sha256(text.encode()).hexdigest(),
        "text": text,
        "context_ids": chat.open_document(text).ids,
        "questions": [
            {
                **asdict(question),
                "ids": chat.first_turn(question.question),
                "answer_ids": [*chat.answer_ids(question.answer), end],
            }
            for question in questions
        ],
    }


def main() -> None:
    """Command line: what to draw, and the file to write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=(2048, 8192), help="in tokens")
    parser.add_argument("--documents", type=int, default=3, help="documents of each length")
    parser.add_argument("--questions", type=int, default=20, help="of each kind and document")
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        parser.error(f"the folder {args.out.parent} does not exist")
    sampler = Sampler(Tokenizer.from_file(str(folder() / "tokenizer.json")))
    tokenizer = AutoTokenizer.from_pretrained(folder())
    chat = ChatTemplate(tokenizer)
    result = {
        "generator": f"amcli.trainer.evaluate.draw, amkv {__version__}",
        "questions_per_kind": args.questions,
        "empty_context_ids": chat.open_document("").ids,
        "documents": [
            document(length, index, args.questions, sampler, chat)
            for length in args.lengths
            for index in range(args.documents)
        ],
    }
    args.out.write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
