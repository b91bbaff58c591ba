"""Measures kvpress on real documents by its own code: presses, prefill, masks and cache are its.

    python docs/benchmarks/real/kvpress_real.py run --model FOLDER --inputs FILE --json OUT
    python docs/benchmarks/real/kvpress_real.py merge --json OUT PART [PART ...]

Imports nothing of amkv; FILE comes from `kvpress_inputs.py`. Runs where kvpress 0.5.5 and a
transformers below 5.3 are. The right answers are forced after a document that was compressed
without knowing the questions, as amkv's own benchmark does it, and compared with what the same
model says after the whole document. OUT has numbers, counts and hashes, and no text.

How the answers are forced. Presses with budgets for each head (AdaKV, KVzip and theirs) free no
memory: before every attention kvpress overwrites the keys of what it "evicted" with one fake key
for each head, sought so that *all queries of that forward pass* look away from it. What comes out
could depend on which queries come in together, so it is done as in kvpress's pipeline: the
question is one pass, and every token of the answer one more. Answers of one document go side by
side where every layer holds as many entries; the fake keys are sought for each row by itself, so
that rows do not touch each other. `--check` puts other ways beside it: one question at a time,
question and answer in one pass (`--one-pass` measures so), and true masks in place of fake keys.
On a 135M model the fake keys gave what true masks give, to the last digit, and the ways differed
by 1e-7 nats a token in float32 and by up to 2e-3 in bfloat16: by rounding alone. So use one way
for all that is compared; here the full context is forced in the same way.

Positions go on after the document's true length, whatever was evicted.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

# kvpress imports these for presses that fetch something, none of which is measured here, and the
# machines with GPUs need not have them.
for _name in ("datasets", "fire", "requests"):
    try:
        import_module(_name)
    except ModuleNotFoundError:
        sys.modules[_name] = types.ModuleType(_name)
        sys.modules[_name].load_dataset = None  # type: ignore[attr-defined]

try:
    import kvpress
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils.logging import disable_progress_bar
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: no module {missing.name!r} here\n"
        "hint: this runs in kvpress's environment; see docs/benchmarks/peers/setup.sh"
    ) from missing

RATIOS = (5, 10, 20, 40, 100)
FULL, NONE = "full context", "no context"

PRESSES: dict[str, tuple[str, Callable[[float], Any]]] = {
    "kvzip": ("KVzipPress(r)", lambda r: kvpress.KVzipPress(r)),
    "kvzip+": (
        "KVzipPress(r, kvzip_plus_normalization=True)",
        lambda r: kvpress.KVzipPress(r, kvzip_plus_normalization=True),
    ),
    "kvgrad": ("KVgradPress(r)", lambda r: kvpress.KVgradPress(r)),
    "kvcompose": ("KVComposePress(compression_ratio=r)", lambda r: _compose(r, True)),
    "kvcompose, unstructured": (
        "KVComposePress(structured=False, compression_ratio=r)",
        lambda r: _compose(r, False),
    ),
    "expected-attention": (
        "ExpectedAttentionPress(r, epsilon=1e-2)",
        lambda r: _expected(r),
    ),
    "expected-attention, adakv": (
        "AdaKVPress(ExpectedAttentionPress(r, epsilon=1e-2))",
        lambda r: kvpress.AdaKVPress(_expected(r)),
    ),
    "expected-attention, criticalkv": (
        "CriticalKVPress(ExpectedAttentionPress(r, use_vnorm=False))",
        lambda r: kvpress.CriticalKVPress(kvpress.ExpectedAttentionPress(r, use_vnorm=False)),
    ),
    "expected-attention, critical adakv": (
        "CriticalAdaKVPress(ExpectedAttentionPress(r, use_vnorm=False))",
        lambda r: kvpress.CriticalAdaKVPress(kvpress.ExpectedAttentionPress(r, use_vnorm=False)),
    ),
    "snapkv": ("SnapKVPress(r)", lambda r: kvpress.SnapKVPress(r)),
    "snapkv, adakv": (
        "AdaKVPress(SnapKVPress(r))",
        lambda r: kvpress.AdaKVPress(kvpress.SnapKVPress(r)),
    ),
    "snapkv, critical adakv": (
        "CriticalAdaKVPress(SnapKVPress(r))",
        lambda r: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(r)),
    ),
    "pyramidkv": ("PyramidKVPress(r)", lambda r: kvpress.PyramidKVPress(r)),
    "compactor": ("CompactorPress(r)", lambda r: kvpress.CompactorPress(r)),
    "compactor, adakv": (
        "AdaKVPress(CompactorPress(r))",
        lambda r: kvpress.AdaKVPress(kvpress.CompactorPress(r)),
    ),
    "cap, adakv": (
        "AdaKVPress(CapPress(r))",
        lambda r: kvpress.AdaKVPress(kvpress.CapPress(r)),
    ),
    "keydiff": ("KeyDiffPress(r)", lambda r: kvpress.KeyDiffPress(r)),
    "lagkv": ("LagKVPress(r)", lambda r: kvpress.LagKVPress(r)),
    "tova": ("TOVAPress(r)", lambda r: kvpress.TOVAPress(r)),
}
# The three that lost least of eight on two documents with a 135M model: 2 to 4% of what no
# context loses at 5×, where AdaKV and CriticalAdaKV around ExpectedAttention, SnapKV and Compactor
# lost 43 to 57%. The others were only looked at on 1,500 tokens of one document at 10×, where they
# lost more than KVzip and KVgrad; `tova` and `expected-attention` with one budget for every head
# were not tried. Not to be had without a network: FastKVzip, KVzap, DMS, RestoreKV, QFilter,
# DuoAttention and LU-KV want gates, adapters, filters or curves made for one model.
DEFAULT = ("kvzip", "kvzip+", "kvgrad")


def _expected(r: float) -> Any:
    return kvpress.ExpectedAttentionPress(r, epsilon=1e-2)


def _compose(r: float, structured: bool) -> Any:
    return kvpress.KVComposePress(structured=structured, compression_ratio=r)


@dataclass(frozen=True)
class Way:
    """How answers are forced; the default is kvpress's own, token by token."""

    rows: int = 16  # questions side by side
    stepwise: bool = True  # one pass a token of the answer; else one for question and answer
    masks: bool = False  # true masks in place of fake keys


WAYS = {
    "one question at a time": Way(rows=1),
    "one pass": Way(rows=1, stepwise=False),
    "masks, stepwise": Way(masks=True),
    "masks, one pass": Way(rows=1, stepwise=False, masks=True),
}


class Peer:
    """A model under kvpress."""

    def __init__(self, folder: Path, device: str, seed: int):
        self.seed = seed
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=self.dtype, attn_implementation="sdpa"
        ).to(self.device)
        self.model.train(False)
        self.attentions = [layer.self_attn for layer in self.model.model.layers]
        self.heads = self.attentions[0].config.num_key_value_heads
        # KVzip and its kin take the tokens before the document from the chat template again.
        tokenizer = AutoTokenizer.from_pretrained(self.model.config.name_or_path)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "dummy context"}], tokenize=False
        )
        prefix = text.partition("dummy context")[0]
        self.prefix: list[int] = tokenizer.encode(prefix, add_special_tokens=False)

    def ids(self, tokens: Sequence[int]) -> torch.Tensor:
        """`tokens` as a batch of one row."""
        return torch.tensor([list(tokens)], device=self.device)

    def clock(self) -> float:
        """The time, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def compress(self, context: Sequence[int], press: Any) -> tuple[Any, float]:
        """The document in a cache, as `KVPressTextGenerationPipeline._forward` does it; seconds."""
        torch.manual_seed(self.seed)  # Compactor draws a random sketch
        cache = DynamicCache()
        began = self.clock()
        # An earlier press may have left something hidden, where this one hides nothing.
        for attention in self.attentions:
            attention.masked_key_indices = None
        with nullcontext() if press is None else press(self.model):
            self.model.model(input_ids=self.ids(context), past_key_values=cache)
        return cache, self.clock() - began

    def hidden(self) -> list[Any]:
        """What each layer holds but hides: indices of (row, head, entry), or None."""
        return [getattr(a, "masked_key_indices", None) for a in self.attentions]

    def force(self, cache: Any, T: int, questions: Sequence[Any], way: Way) -> list[torch.Tensor]:
        """Log-probabilities `[targets, V]`, float32, at every target of every question.

        T is the document's true length. The cache is as before afterwards, fake keys aside.
        """
        with true_masks() if way.masks else nullcontext():
            if not way.stepwise:
                return [self._one_pass(cache, T, question) for question in questions]
            lengths = {layer.keys.shape[2] for layer in cache.layers}
            # Padding needs a mask, and transformers makes one for all layers.
            rows = way.rows if len(lengths) == 1 else 1
            found: list[torch.Tensor] = []
            for start in range(0, len(questions), rows):
                found += self._steps(cache, T, questions[start : start + rows])
            return found

    def _feed(self, cache: Any, tokens: Sequence[int], T: int, last: int) -> Any:
        """Runs tokens after the cache; the `last` predictions, `[last, V]`, and what was added."""
        held = [layer.keys.shape[2] for layer in cache.layers]
        logits = self.model(
            input_ids=self.ids(tokens),
            past_key_values=cache,
            position_ids=torch.arange(T, T + len(tokens), device=self.device)[None],
            logits_to_keep=last,
        ).logits[0]
        added = []
        for layer, n in zip(cache.layers, held, strict=True):
            added.append((layer.keys[:, :, n:], layer.values[:, :, n:]))
            layer.keys, layer.values = layer.keys[:, :, :n], layer.values[:, :, :n]
        return logits.float().log_softmax(-1), added

    def _one_pass(self, cache: Any, T: int, question: Any) -> torch.Tensor:
        targets = question["target_ids"]
        tokens = question["prompt_ids"] + targets[:-1]
        return self._feed(cache, tokens, T, len(targets))[0]

    def _steps(self, cache: Any, T: int, questions: Sequence[Any]) -> list[torch.Tensor]:
        """Each question in a pass of its own, then all their answers token by token."""
        prompts = [question["prompt_ids"] for question in questions]
        targets = [question["target_ids"] for question in questions]
        first, tails = zip(*(self._feed(cache, ids, T, 1) for ids in prompts), strict=True)
        found = [[logp[-1]] for logp in first]
        fork = side_by_side(cache, tails)
        lengths = torch.tensor([len(ids) for ids in prompts], device=self.device)
        widest = int(lengths.max())
        held = cache.layers[0].keys.shape[2]
        seen = torch.ones(len(questions), held + widest, dtype=torch.long, device=self.device)
        seen[:, held:] = torch.arange(widest, device=self.device) < lengths[:, None]
        with self._rows(len(questions)):
            for step in range(max(map(len, targets)) - 1):
                # A row that is through feeds its end again; nobody reads what it predicts.
                tokens = [ids[min(step, len(ids) - 1)] for ids in targets]
                seen = torch.cat([seen, seen.new_ones(len(questions), 1)], dim=1)
                logits = self.model(
                    input_ids=torch.tensor(tokens, device=self.device)[:, None],
                    past_key_values=fork,
                    position_ids=(T + lengths + step)[:, None],
                    attention_mask=seen if len(questions) > 1 else None,
                ).logits[:, -1]
                for row, logp in enumerate(logits.float().log_softmax(-1)):
                    if step + 1 < len(targets[row]):
                        found[row].append(logp.clone())
        return [torch.stack(rows) for rows in found]

    @contextmanager
    def _rows(self, count: int) -> Iterator[None]:
        """Inside, what is hidden from one row is hidden from `count`."""
        before = self.hidden()
        for attention, indices in zip(self.attentions, before, strict=True):
            if indices is not None:
                # KVzip leaves them on the processor: a copy a layer and token, if it stays so.
                head, entry = (where.to(self.device) for where in indices[1:])
                row = torch.arange(count, device=self.device).repeat_interleave(len(head))
                attention.masked_key_indices = (row, head.repeat(count), entry.repeat(count))
        try:
            yield
        finally:
            for attention, indices in zip(self.attentions, before, strict=True):
                attention.masked_key_indices = indices


def side_by_side(cache: Any, tails: Sequence[Any]) -> Any:
    """The cache once for every question, with that question's entries after it, padded."""
    fork = DynamicCache()
    widest = max(tail[0][0].shape[2] for tail in tails)
    for i, layer in enumerate(cache.layers):
        grown = []
        for which, whole in enumerate((layer.keys, layer.values)):
            parts = [torch.nn.functional.pad(
                tail[i][which], (0, 0, 0, widest - tail[i][which].shape[2])
            ) for tail in tails]  # fmt: skip
            grown.append(torch.cat([whole.expand(len(tails), -1, -1, -1), torch.cat(parts)], 2))
        fork.update(grown[0], grown[1], i)
    return fork


@contextmanager
def true_masks() -> Iterator[None]:
    """Inside, what a press hides is masked: what its fake keys are meant to come to."""
    patched = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def masked(
        module: Any, query: Any, key: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        indices = getattr(module, "masked_key_indices", None)
        if indices is None:
            return patched(module, query, key, value, mask, *rest, **kwargs)
        (B, H, q, _), k = query.shape, key.shape[2]
        if mask is None:
            mask = query.new_ones(q, k, dtype=torch.bool).tril(k - q)
        elif mask.dtype != torch.bool:
            mask = mask >= 0
        row, head, entry = indices
        open_ = query.new_ones(B, key.shape[1], 1, k, dtype=torch.bool)
        open_[row, head, 0, entry] = False
        mask = mask[..., -k:] & open_.repeat_interleave(H // key.shape[1], dim=1)
        module.masked_key_indices = None
        try:
            return patched(module, query, key, value, mask, *rest, **kwargs)
        finally:
            module.masked_key_indices = indices

    ALL_ATTENTION_FUNCTIONS["sdpa"] = masked
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = patched


def outcome(
    truth: torch.Tensor, logp: torch.Tensor, targets: Sequence[int], stops: Sequence[int]
) -> list[float]:
    """[exact, nats of the answer, KL(truth ‖ logp), agreeing tokens, tokens], sums."""
    goal = torch.tensor(targets, device=logp.device)
    top = logp.argmax(-1)
    right = top == goal
    # Any end token ends an answer, whichever one the template writes.
    right[-1] = right[-1] | (top[-1].item() in stops)
    p = truth.exp()
    terms = torch.where(p > 0, p * (truth - logp), 0.0).sum(-1).clamp_min(0.0)
    return [
        int(right.all()),
        round(-logp.gather(1, goal[:, None]).double().sum().item(), 6),
        round(terms.double().sum().item(), 6),
        int((top == truth.argmax(-1)).sum()),
        len(targets),
    ]


@dataclass
class Bench:
    """One document in a model, and what the whole of it says."""

    peer: Peer
    given: dict[str, Any]
    document: dict[str, Any]
    way: Way

    def __post_init__(self) -> None:
        context = self.document["context_ids"]
        cache, self.prefill = self.peer.compress(context, None)
        self.entries = len(context) * self.peer.heads * len(cache.layers)
        self.truth = self.peer.force(cache, len(context), self.document["questions"], self.way)

    def outcomes(self, cache: Any, T: int) -> list[list[float]]:
        """What each question gave after a context of T tokens."""
        questions = self.document["questions"]
        said = self.peer.force(cache, T, questions, self.way)
        return [
            outcome(truth, logp, question["target_ids"], self.given["stop_ids"])
            for truth, logp, question in zip(self.truth, said, questions, strict=True)
        ]

    def cell(self, method: str, ratio: int | None) -> dict[str, Any]:
        """One method at one ratio: outcomes, seconds, and what is in memory and to be seen."""
        context = self.document["context_ids"]
        if method == NONE:
            context = self.given["empty_context_ids"]
        press = None if ratio is None else PRESSES[method][1](1 - 1 / ratio)
        try:
            cache, seconds = self.peer.compress(context, press)
            held = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)
            hidden = sum(len(where[0]) for where in self.peer.hidden() if where is not None)
            outcomes = self.outcomes(cache, len(context))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what a peer cannot do is a result, too
            return {"error": f"{type(error).__name__}: {error}"}
        return {
            "outcomes": outcomes,
            "seconds": round(seconds, 3),
            "entries": [self.entries, held, held - hidden],
        }

    def check(self, method: str, ratio: int) -> dict[str, Any]:
        """KL in nats per token between ways of forcing and the one that is measured."""
        context = self.document["context_ids"]
        questions = self.document["questions"]
        tokens = sum(len(question["target_ids"]) for question in questions)
        found: dict[str, Any] = {"method": method, "ratio": ratio}
        cache, _ = self.peer.compress(context, PRESSES[method][1](1 - 1 / ratio))
        whole = [(layer.keys, layer.values) for layer in cache.layers]
        for name, way in {"measured": self.way, **WAYS}.items():
            for layer, (keys, values) in zip(cache.layers, whole, strict=True):
                layer.keys, layer.values = keys.clone(), values.clone()
            try:
                said = self.peer.force(cache, len(context), questions, way)
            except ValueError as error:
                found[name] = {"error": str(error)}
                continue
            if name == "measured":
                measured = said
            sums = [0.0, 0.0]
            for mine, theirs, truth, question in zip(
                measured, said, self.truth, questions, strict=True
            ):
                targets, stops = question["target_ids"], self.given["stop_ids"]
                sums[0] += outcome(mine, theirs, targets, stops)[2]
                sums[1] += outcome(truth, theirs, targets, stops)[2]
            found[name] = {"from measured": sums[0] / tokens, "from full": sums[1] / tokens}
        return found


def summary(cells: dict[str, Any], nothing: dict[str, Any]) -> dict[str, Any]:
    """What all finished documents of a row come to; `lost` is out of what they lose with none."""
    done = {name: cell for name, cell in cells.items() if "error" not in cell}
    asked = [question for cell in done.values() for question in cell["outcomes"]]
    if not asked:
        return {}
    exact, nll, kl, agree, tokens = (sum(column) for column in zip(*asked, strict=True))
    bare = sum(q[2] for name in done if name in nothing for q in nothing[name]["outcomes"])
    full, held, seen = (sum(c["entries"][i] for c in done.values()) for i in range(3))
    return {
        "kl": round(kl / tokens, 6),
        "lost": round(kl / bare, 5) if bare else None,
        "nll": round(nll / tokens, 6),
        "agreement": round(agree / tokens, 5),
        "recall": round(exact / len(asked), 5),
        "questions": len(asked),
        "tokens": tokens,
        "stored": "all: it only hides" if seen < held == full else "what it keeps",
        "stored_fraction": round(held / full, 5),
        "seen_fraction": round(seen / full, 5),
    }


def summed(result: dict[str, Any]) -> dict[str, Any]:
    """The result with its rows in order and their summaries made anew."""
    rows = sorted(result["rows"], key=lambda row: (row["ratio"] or 0, _place(row["method"])))
    nothing = next((row["cells"] for row in rows if row["method"] == NONE), {})
    keys = ("method", "ratio", "cells")
    rows = [{k: row[k] for k in keys} | summary(row["cells"], nothing) for row in rows]
    # The cells come last: a reader sees the numbers first.
    return result | {"rows": [row | {"cells": row.pop("cells")} for row in rows]}


def _place(method: str) -> int:
    return [FULL, NONE, *PRESSES].index(method)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| method | ratio | documents | KL | lost | NLL | agreement | exact | seen | stored |"]
    lines.append("| --- " * 10 + "|")
    for row in rows:
        ratio = f"{row['ratio']}×" if row["ratio"] else ""
        done = sum("error" not in cell for cell in row["cells"].values())
        start = f"| {row['method']} | {ratio} | {done} of {len(row['cells'])} |"
        if not done:
            lines.append(f"{start} {next(iter(row['cells'].values()))['error']} | | | | | | |")
            continue
        lost = "" if row["lost"] is None else f"{100 * row['lost']:.1f}%"
        lines.append(
            f"{start} {row['kl']:.4f} | {lost} | {row['nll']:.4f} | {row['agreement']:.3f} | "
            f"{row['recall']:.3f} | {row['seen_fraction']:.4f} | {row['stored']} |"
        )
    return "\n".join(lines)


def circumstances(args: argparse.Namespace, peer: Peer, given: dict[str, Any]) -> dict[str, Any]:
    """When, on what, with what and about what this is measured."""
    name = platform.processor() or platform.machine()
    if peer.device.type == "cuda":
        name = torch.cuda.get_device_name(peer.device)
    packages = ("kvpress", "transformers", "tokenizers", "torch", "numpy")
    return {
        "what": "kvpress by its own code on real documents: forced right answers",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "model": args.model.resolve().name,
        "config_sha256": sha256((args.model / "config.json").read_bytes()).hexdigest(),
        "device": name,
        "dtype": str(peer.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "seed": args.seed,
        "inputs": given["made_by"],
        "forcing": "one pass" if args.one_pass else "token by token",
        "presses": {name: code for name, (code, _) in PRESSES.items()},
        "cell": "outcomes: a question's [exact, nll, kl, agree, tokens], sums in nats; "
        "entries: (key, value) pairs of the whole document, in memory, not hidden; "
        "seconds: prefill and press",
    }


def about(document: dict[str, Any]) -> dict[str, Any]:
    """What a result says of a document: no text."""
    return {
        "text_sha256": document["text_sha256"],
        "tokens": len(document["context_ids"]),
        "questions": len(document["questions"]),
    }


def chosen(given: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The documents of this part, shortest first, so that parts are about as long."""
    documents = sorted(given["documents"], key=lambda d: len(d["context_ids"]))[: args.first]
    part, parts = args.part
    return documents[part - 1 :: parts]


def measure(args: argparse.Namespace) -> None:
    """Measures every cell that the result lacks; writes the result after each of them."""
    given = json.loads(args.inputs.read_text(encoding="utf-8"))
    peer = Peer(args.model, args.device, args.seed)
    result = circumstances(args, peer, given) | {"documents": {}, "rows": [], "checks": []}
    if result["config_sha256"] != given["config_sha256"]:
        raise ValueError(f"{args.inputs} was made for another model")
    if args.json.exists():
        earlier = json.loads(args.json.read_text(encoding="utf-8"))
        if differing := unlike(earlier, result):
            raise ValueError(f"{args.json} was measured with other {', '.join(differing)}")
        result |= {key: earlier[key] for key in ("documents", "rows", "checks")}
    rows = {(row["method"], row["ratio"]): row for row in result["rows"]}
    wanted = [(FULL, None), (NONE, None)]
    wanted += [(method, ratio) for method in args.methods for ratio in args.ratios]
    documents = chosen(given, args)
    if peer.device.type == "cuda" and documents:  # the first pass is slower than any other
        peer.compress(documents[0]["context_ids"], None)
    for document in documents:
        name = document["name_sha256"]
        if peer.prefix != document["context_ids"][: document["prefix"]]:
            raise ValueError("kvpress would put other tokens before the document than amkv")
        todo = [k for k in wanted if k not in rows or name not in rows[k]["cells"]]
        if not todo:
            continue
        bench = Bench(peer, given, document, Way(1, False) if args.one_pass else Way())
        known = result["documents"].setdefault(name, about(document))
        for method, ratio in todo:
            row = rows.setdefault((method, ratio), {"method": method, "ratio": ratio, "cells": {}})
            row["cells"][name] = cell = bench.cell(method, ratio)
            said = cell.get("error") or f"{sum(q[2] for q in cell['outcomes']):.3f} nats"
            print(name[:8], method, ratio, said, flush=True)
            if method == FULL and "amkv_nll" in document:
                mine = [question[1] for question in cell["outcomes"]]
                pairs = list(zip(mine, document["amkv_nll"], strict=True))
                known["amkv_nll_differs"] = max(abs(a - b) for a, b in pairs)
                print(name[:8], "from amkv's own:", known["amkv_nll_differs"], flush=True)
            if args.check and ratio is not None and "error" not in cell:
                result["checks"].append({"document": name, **bench.check(method, ratio)})
                print(json.dumps(result["checks"][-1]), flush=True)
            result = summed(result | {"rows": list(rows.values())})
            args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(table(result["rows"]))


def unlike(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """In which of their circumstances two results differ; dates and code lists may."""
    free = {"date", "documents", "rows", "checks", "presses"}
    return sorted(key for key in other.keys() - free if one.get(key) != other[key])


def merge(args: argparse.Namespace) -> None:
    """Puts the documents of several results into one."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.parts]
    whole = results[0]
    rows = {(row["method"], row["ratio"]): row for row in whole["rows"]}
    for path, part in zip(args.parts[1:], results[1:], strict=True):
        if differing := unlike(whole, part):
            raise ValueError(f"{path} was measured with other {', '.join(differing)}")
        whole["documents"] |= part["documents"]
        whole["checks"] += part["checks"]
        for row in part["rows"]:
            key = row["method"], row["ratio"]
            rows[key] = row if key not in rows else rows[key] | {
                "cells": rows[key]["cells"] | row["cells"]
            }  # fmt: skip
    whole = summed(whole | {"rows": list(rows.values())})
    args.json.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    print(table(whole["rows"]))


def _part(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError
    return part, parts


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure")
    run.add_argument("--model", type=Path, required=True, help="folder of the model")
    run.add_argument("--inputs", type=Path, required=True, help="from kvpress_inputs.py")
    run.add_argument("--json", type=Path, required=True, help="result; cells in it are kept")
    run.add_argument(
        "--methods", nargs="+", choices=PRESSES, default=DEFAULT, metavar="NAME",
        help=f"these, quoted: {', '.join(map(repr, PRESSES))}",
    )  # fmt: skip
    run.add_argument("--ratios", type=int, nargs="+", default=RATIOS, help="kept: 1/ratio")
    run.add_argument("--first", type=int, help="only the N shortest documents")
    run.add_argument(
        "--part", type=_part, default=(1, 1), metavar="K/N", help="every N-th document"
    )
    run.add_argument("--one-pass", action="store_true", help="force answers in one pass: faster")
    run.add_argument("--check", action="store_true", help="compare ways of forcing")
    run.add_argument("--seed", type=int, default=0, help="of what a press draws at random")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    join = verbs.add_parser("merge", help="put results of parts together")
    join.add_argument("--json", type=Path, required=True, help="the file to write")
    join.add_argument("parts", type=Path, nargs="+", help="results of `run`")
    return parser.parse_args()


def main() -> None:
    """Command line: one line for what a user can put right, no traceback."""
    args = arguments()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        if args.verb == "merge":
            merge(args)
        else:
            # Not inference mode: KVgrad wants gradients of what the prefill left.
            with torch.no_grad():
                measure(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
