"""Measures kvpress by its own code: presses, prefill, cache and decoding are all kvpress's.

    PEERS/bin/python docs/benchmarks/peers/kvpress_recall.py --documents FILE --json OUT

Runs in the environment that `setup.sh` makes and imports nothing of amkv. FILE comes from
`documents.py`; before anything is measured, the ids that kvpress's pipeline makes of it are
compared with amkv's, token for token. An answer is right if the whole greedy answer is the only
right one, word for word. Answers are decoded token by token, as kvpress does it, and not in one
pass over the right answer: the fake keys that hide masked entries depend on which queries come in
together, and are not perfect. kvpress's ratio is the removed fraction; here every row names what is
kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    import torch
    from kvpress import (
        AdaKVPress,
        BasePress,
        CompactorPress,
        ExpectedAttentionPress,
        KVPressTextGenerationPipeline,
        KVzipPress,
        SnapKVPress,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: no module {missing.name!r} here\n"
        "hint: make kvpress's environment with setup.sh, and use its python: FOLDER/bin/python"
    ) from missing

BLANK = "\n\n"
NO_LIMIT = 1 << 30
KEPT = (1 / 5, 1 / 10, 1 / 20, 1 / 50)
WEIGHTS = Path(__file__).parents[3] / "amcli" / "pocket" / "weights"

# What pocket was trained to repeat by, in place of the words that KVzip's code has.
POCKET_WORDS = {
    "\n\nRepeat the previous context exactly.": "\n\nRepeat the previous context.",
    "\n\nRepeat the part of the previous context exactly, starting with": (
        "\n\nRepeat the part of the previous context that begins with:"
    ),
}


class _Words:
    """A tokenizer that swaps KVzip's instructions for pocket's before it encodes them."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def encode(self, text: str, **options: Any) -> Any:
        return self._tokenizer.encode(POCKET_WORDS[text], **options)


class PocketKVzip(KVzipPress):  # type: ignore[misc]
    """KVzip as it is, asking for the repetition in words that pocket knows."""

    def prepare(self, model: Any, tokenizer: Any, prev_postfix_size: int = 8) -> Any:
        """Pairs of (chunk, instruction and chunk), as KVzip makes them."""
        return super().prepare(model, _Words(tokenizer), prev_postfix_size)


PRESSES: dict[str, tuple[str, Callable[[float], BasePress]]] = {
    "kvzip": ("KVzipPress(r)", lambda r: KVzipPress(r)),
    "kvzip, pocket's words": ("KVzipPress(r), instructions reworded", lambda r: PocketKVzip(r)),
    "snapkv": ("SnapKVPress(r)", lambda r: SnapKVPress(r)),
    "snapkv, window 16": (
        "SnapKVPress(r, window_size=16)",
        lambda r: SnapKVPress(r, window_size=16),
    ),
    "expected-attention, adakv": (
        "AdaKVPress(ExpectedAttentionPress(r, epsilon=1e-2))",
        lambda r: AdaKVPress(ExpectedAttentionPress(r, epsilon=1e-2)),
    ),
    "expected-attention, adakv, no epsilon": (
        "AdaKVPress(ExpectedAttentionPress(r))",
        lambda r: AdaKVPress(ExpectedAttentionPress(r)),
    ),
    "compactor": ("CompactorPress(r)", lambda r: CompactorPress(r)),
}


@dataclass
class Cell:
    """What one press at one kept fraction gave on the documents of one length."""

    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    entries: int = 0  # (key, value) pairs that the whole documents have
    held: int = 0  # pairs that are in memory
    masked: int = 0  # of those, how many no query may see
    stored_bytes: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def row(self) -> dict[str, Any]:
        """Recall by kind, and what is really stored beside what is nominally kept."""
        return {
            "recall": {k: round(self.right[k] / self.asked[k], 4) for k in self.asked},
            "right": dict(self.right),
            "asked": dict(self.asked),
            "attended_fraction": round((self.held - self.masked) / self.entries, 5),
            "stored_fraction": round(self.held / self.entries, 5),
            "stored_bytes": self.stored_bytes,  # one number a document
            "seconds": {stage: round(took, 1) for stage, took in self.seconds.items()},
        }


class Peer:
    """kvpress's pipeline on one model, fp32, on the CPU."""

    def __init__(self, folder: Path, seed: int):
        self.seed = seed
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self.pipeline = KVPressTextGenerationPipeline(model=self.model, tokenizer=tokenizer)

    def same_ids(self, text: str, context_ids: list[int], questions: Sequence[Any]) -> None:
        """Raises ValueError where kvpress would feed other tokens than amkv does."""
        made = self.pipeline.preprocess(
            text, [BLANK + q["question"] for q in questions], "", NO_LIMIT
        )
        if made["context_ids"][0].tolist() != context_ids:
            raise ValueError("kvpress's context ids differ from amkv's")
        for question, ids in zip(questions, made["questions_ids"], strict=True):
            if ids[0].tolist() != question["ids"]:
                raise ValueError(f"kvpress's ids differ from amkv's: {question['question']}")

    def compress(self, context_ids: list[int], press: BasePress | None) -> Any:
        """The document in a cache, as `KVPressTextGenerationPipeline._forward` does it."""
        torch.manual_seed(self.seed)  # Compactor draws a random sketch
        cache = DynamicCache()
        with nullcontext() if press is None else press(self.model):
            self.model.model(input_ids=torch.tensor([context_ids]), past_key_values=cache)
        return cache

    def masked(self) -> int:
        """Entries that the press left in the cache but hides from every query."""
        hidden = (
            getattr(layer.self_attn, "masked_key_indices", None)
            for layer in self.model.model.layers
        )
        return sum(len(indices[0]) for indices in hidden if indices is not None)

    def right(self, cache: Any, T: int, question: dict[str, Any]) -> bool:
        """Whether kvpress's greedy decoding gives the whole answer, and ends there."""
        lengths = [cache.get_seq_length(i) for i in range(len(cache))]
        said = self.pipeline.generate_answer(
            question_ids=torch.tensor([question["ids"]]),
            cache=cache,
            context_length=T,
            max_new_tokens=len(question["answer_ids"]) + 1,
        )
        self.pipeline._remove_answer_from_cache(cache, lengths)
        return bool(said == question["answer"])

    def ask(
        self,
        cell: Cell,
        document: dict[str, Any],
        context_ids: list[int],
        press: BasePress | None,
    ) -> None:
        """Compresses one context and asks all questions about its document; counts into `cell`."""
        began = time.perf_counter()
        cache = self.compress(context_ids, press)
        cell.seconds["prefill and press"] += time.perf_counter() - began
        T, heads = len(context_ids), self.model.config.num_key_value_heads
        cell.entries += len(document["context_ids"]) * heads * len(cache)
        cell.held += sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)
        cell.masked += self.masked()
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        cell.stored_bytes.append(sum(t.numel() * t.element_size() for t in tensors))
        began = time.perf_counter()
        for question in document["questions"]:
            cell.asked[question["kind"]] += 1
            cell.right[question["kind"]] += self.right(cache, T, question)
        cell.seconds["questions"] += time.perf_counter() - began


def cells(
    lengths: Iterable[int], methods: Iterable[str]
) -> Iterator[tuple[int, str, float | None]]:
    """Every (length, method, kept fraction), the anchors first."""
    for length in lengths:
        yield length, "full context", None
        yield length, "no context", None
        for method in methods:
            for kept in KEPT:
                yield length, method, kept


def measure(
    peer: Peer,
    documents: Sequence[Any],
    nothing: list[int],
    method: str,
    kept: float | None,
) -> dict[str, Any]:
    """One row. A press that does not run gives its error text in place of numbers."""
    row = {"length": documents[0]["length"], "method": method, "kept": kept}
    cell = Cell()
    try:
        for document in documents:
            ids = nothing if method == "no context" else document["context_ids"]
            press = None if kept is None else PRESSES[method][1](1 - kept)
            peer.ask(cell, document, ids, press)
    except Exception as error:  # what a peer cannot do is a result, too
        return row | {"error": f"{type(error).__name__}: {error}"}
    return row | cell.row()


def chosen(
    documents: Sequence[dict[str, Any]], length: int, first: int | None, questions: int | None
) -> list[dict[str, Any]]:
    """The first documents of a length, each with the first questions of every kind.

    Raises ValueError where there is no document of that length.
    """
    if length not in (known := {d["length"] for d in documents}):
        raise ValueError(f"no document of length {length}, only of {sorted(known)}")
    found = []
    for document in [d for d in documents if d["length"] == length][:first]:
        seen: Counter[str] = Counter()
        kept = []
        for question in document["questions"]:
            seen[question["kind"]] += 1
            if questions is None or seen[question["kind"]] <= questions:
                kept.append(question)
        found.append(document | {"questions": kept})
    return found


def circumstances(folder: Path, given: dict[str, Any], seed: int) -> dict[str, Any]:
    """When, on what, with what and about what this was measured."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("kvpress", "torch", "transformers", "tokenizers", "numpy")
    return {
        "what": "kvpress, by its own code, on pocket's documents: exact match of whole answers",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "weights_sha256": sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "seed": seed,
        "presses": {name: code for name, (code, _) in PRESSES.items()},
        "generator": given["generator"],
        "documents": [
            {key: document[key] for key in ("seed", "length", "tokens", "sha256")}
            for document in given["documents"]
        ],
        "questions_per_kind": given["questions_per_kind"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, one table a length."""
    lines: list[str] = []
    for length in dict.fromkeys(row["length"] for row in rows):
        lines += ["", f"{length:,} tokens", ""]
        lines += ["| method | kept | direct | reverse | two-hop | bytes in memory | of full |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for row in (r for r in rows if r["length"] == length):
            kept = "" if row["kept"] is None else f"1/{round(1 / row['kept'])}"
            start = f"| {row['method']} | {kept} |"
            if "error" in row:
                lines.append(f"{start} {row['error']} | | | | |")
                continue
            mean = sum(row["stored_bytes"]) / len(row["stored_bytes"])
            scores = " | ".join(f"{score:.2f}" for score in row["recall"].values())
            lines.append(f"{start} {scores} | {mean:,.0f} | {row['stored_fraction']:.3f} |")
    return "\n".join(lines)


def resume(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier run, if it was on the same thing; ValueError if it was not."""
    if not path.exists():
        return result | {"rows": []}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for key in result.keys() - {"date"}:
        if earlier.get(key) != result[key]:
            raise ValueError(f"{path} was measured with other {key}: choose another file")
    return result | {"rows": earlier["rows"]}


def count(text: str) -> int:
    """A whole number of at least 1, as argparse wants it."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def arguments() -> argparse.Namespace:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=Path, required=True, help="from documents.py")
    parser.add_argument("--json", type=Path, required=True, help="result; rows in it are kept")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="folder of the model")
    parser.add_argument("--lengths", type=count, nargs="+", help="only documents of these lengths")
    parser.add_argument(
        "--methods", nargs="+", choices=PRESSES, default=list(PRESSES), metavar="NAME",
        help=f"only these, quoted: {', '.join(map(repr, PRESSES))}",
    )  # fmt: skip
    parser.add_argument("--first", type=count, help="only the first N documents of a length")
    parser.add_argument("--questions", type=count, help="only the first N of a kind and document")
    parser.add_argument("--seed", type=int, default=0, help="of what a press draws at random")
    return parser.parse_args()


def read(path: Path) -> dict[str, Any]:
    """The documents and questions that `documents.py` wrote; ValueError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or "empty_context_ids" not in found:
        raise ValueError(f"{path} is not what documents.py writes")
    return found


def run(args: argparse.Namespace) -> None:
    """Measures every cell that the result file lacks; writes the file after each of them."""
    given = read(args.documents)
    if not (args.model / "config.json").exists():
        raise ValueError(f"{args.model} is not the folder of a model")
    if not args.json.parent.is_dir():
        raise ValueError(f"the folder {args.json.parent} does not exist")
    result = resume(args.json, circumstances(args.model, given, args.seed) | {"ids_equal": True})
    lengths = args.lengths or list(dict.fromkeys(d["length"] for d in given["documents"]))
    documents = {n: chosen(given["documents"], n, args.first, args.questions) for n in lengths}
    peer = Peer(args.model, args.seed)
    for document in given["documents"]:
        peer.same_ids(document["text"], document["context_ids"], document["questions"])
        peer.same_ids("", given["empty_context_ids"], document["questions"])
    rows = result["rows"]
    done = {(row["length"], row["method"], row["kept"]) for row in rows}
    with torch.inference_mode():
        for length, method, kept in cells(lengths, args.methods):
            if (length, method, kept) in done:
                continue
            nothing = given["empty_context_ids"]
            rows.append(measure(peer, documents[length], nothing, method, kept))
            print(json.dumps(rows[-1]), flush=True)
            rows.sort(key=lambda row: row["length"])
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def main() -> None:
    """Command line: one line for what a user can put right, no traceback."""
    args = arguments()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    try:
        run(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
