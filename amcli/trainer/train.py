"""Trains pocket: `python -m amcli.trainer.train --out FOLDER`.

One CUDA device trains the published model in under 25 minutes; `--preset tiny` runs the same
code in minutes on a CPU, and `llama` and `olmo2` train models of other architectures on the same
documents. Every batch is a function of the seed and the step alone, so a run can be cut off and
resumed. The learning rate is constant after a warm-up and falls linearly to zero over the last
part ("warm-up, stable, decay"), so `--tokens` may still be changed by a resumed run. `--seconds`
plans by the clock instead: such a run ends on time, its learning rate at zero, but a second one
differs from it by as many steps as the machine is slower or faster.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from amcli.generator.dialogues import QUESTION_KINDS
from amcli.generator.tokens import (
    CHAT_TEMPLATE,
    END,
    PAD,
    START,
    Sampler,
    special_id,
    train_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Preset:
    """Shape of the model, and the plan of the run.

    stages  (until this many tokens, {sequence length: share of the steps})
    arch    architecture, as `model_type` names it in a configuration of transformers
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    step_tokens: int
    tokens: int
    learning_rate: float
    warmup_steps: int
    stages: tuple[tuple[float, dict[int, float]], ...]
    arch: str = "qwen3"


OTHER_STAGES = (
    (120e6, {1024: 1.0}),
    (220e6, {1024: 0.5, 4096: 0.5}),
    (math.inf, {1024: 0.2, 4096: 0.4, 10240: 0.4}),
)

PRESETS = {
    "pocket": Preset(
        384, 9, 8, 2, 512, 49152, 560_000_000, 1.5e-3, 300,
        (
            (90e6, {1024: 1.0}),
            (220e6, {1024: 0.5, 4096: 0.5}),
            (math.inf, {1024: 0.2, 4096: 0.4, 10240: 0.4}),
        ),
    ),
    # Llama does not normalise queries and keys to bound its logits, hence the lower learning rate.
    "llama": Preset(
        256, 12, 8, 4, 384, 49152, 500_000_000, 1e-3, 300, OTHER_STAGES, "llama"
    ),
    "olmo2": Preset(
        384, 7, 6, 6, 512, 49152, 500_000_000, 1.5e-3, 300, OTHER_STAGES, "olmo2"
    ),
    "tiny": Preset(
        64, 2, 4, 2, 128, 2048, 200_000, 3e-3, 20,
        ((math.inf, {256: 0.5, 512: 0.5}),),
    ),
}  # fmt: skip

DECAY = 0.25  # the share of the run in which the learning rate falls


class Batches(Dataset[Batch]):
    """Batch `step` of a run: token ids `[B, L]` int32 and loss weights `[B, L]` uint8."""

    def __init__(self, preset: Preset, tokenizer_file: str, seed: int, steps: int, first: int):
        self.preset, self.file, self.seed = preset, tokenizer_file, seed
        self.steps, self.first = steps, first
        self.sampler: Sampler | None = None

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> Batch:
        from tokenizers import Tokenizer

        if self.sampler is None:  # in the worker, once
            self.sampler = Sampler(Tokenizer.from_file(self.file))
        step = self.first + index
        length = sequence_length(self.preset, self.seed, step)
        size = max(1, self.preset.step_tokens // length)
        ids = torch.zeros(size, length, dtype=torch.int32)
        weights = torch.zeros(size, length, dtype=torch.uint8)
        for row in range(size):
            sample = self.sampler.sample(f"train/{self.seed}/{step}/{row}", length)
            ids[row, : len(sample.ids)] = torch.tensor(sample.ids, dtype=torch.int32)
            weights[row, : len(sample.ids)] = torch.tensor(sample.weights, dtype=torch.uint8)
        return ids, weights


def sequence_length(preset: Preset, seed: int, step: int) -> int:
    """The sequence length of a step, drawn from its stage's plan."""
    tokens = step * preset.step_tokens
    shares = next(shares for until, shares in preset.stages if tokens < until)
    rng = Random(f"length/{seed}/{step}")
    return rng.choices(list(shares), list(shares.values()))[0]


def learning_rate(preset: Preset, step: int, steps: int, clock: float = 0.0) -> float:
    """Warm-up, constant, then falling linearly to zero over the last `DECAY` of the run.

    clock  the share of the run's time that has passed; whichever of steps and time is scarcer
           decides how much of the run is left
    """
    warm = min(1.0, (step + 1) / preset.warmup_steps)
    left = min((steps - step) / max(1.0, DECAY * steps), (1.0 - clock) / DECAY)
    return preset.learning_rate * min(warm, left, 1.0)


def build(preset: Preset, vocabulary: int) -> PreTrainedModel:
    """A randomly initialised model of the preset's architecture and shape, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        preset.arch,
        vocab_size=vocabulary,
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=64,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        # Some architectures default to special tokens of their family's vocabulary; a padding
        # token there would keep our embedding at that id from learning. `publish` sets our own.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token, weighted. Shapes `[B, L, V]`, `[B, L]`, `[B, L]`."""
    targets, w = ids[:, 1:].reshape(-1), weights[:, 1:].reshape(-1).float()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none")
    return (losses * w).sum() / w.sum().clamp_min(1.0)


def optimizer_for(model: torch.nn.Module, preset: Preset, cuda: bool) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, 0.95), fused=cuda)


@torch.no_grad()
def recall(
    model: torch.nn.Module,
    sampler: Sampler,
    length: int,
    samples: int,
    device: str,
    tag: str = "eval",
) -> dict[str, float]:
    """Share of answers that greedy decoding would give whole, by kind, at one length.

    Teacher-forced: if every token of an answer and its end is the most likely one, greedy
    decoding yields exactly that answer.
    """
    right = dict.fromkeys(QUESTION_KINDS, 0)
    asked = dict.fromkeys(QUESTION_KINDS, 0)
    for index in range(samples):
        sample = sampler.sample(f"{tag}/{length}/{index}", length)
        ids = torch.tensor([sample.ids], device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            best = model(input_ids=ids, use_cache=False).logits[0].argmax(-1).tolist()
        for kind, first, last in sample.answers:
            if kind in asked:
                asked[kind] += 1
                right[kind] += best[first - 1 : last - 1] == sample.ids[first:last]
    return {kind: round(right[kind] / max(1, asked[kind]), 4) for kind in QUESTION_KINDS}


class Run:
    """One training run with its checkpoint and its log in `out`."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.preset = PRESETS[args.preset]
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer_file = self.out / "tokenizer-raw.json"
        self.checkpoint = self.out / "checkpoint.pt"
        self.log = self.out / "log.jsonl"

    def prepare(self) -> None:
        """Makes tokenizer, model and optimizer, or loads them from a checkpoint to resume."""
        from tokenizers import Tokenizer

        if not self.tokenizer_file.exists():
            documents = 300 if self.args.preset == "tiny" else 3000
            train_tokenizer(self.args.seed, documents).save(str(self.tokenizer_file))
        self.tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        self.sampler = Sampler(self.tokenizer)
        torch.manual_seed(self.args.seed)
        self.model = build(self.preset, self.tokenizer.get_vocab_size())
        self.model.to(self.device)  # type: ignore[arg-type]
        self.optimizer = optimizer_for(self.model, self.preset, self.device == "cuda")
        self.step = 0
        if self.args.resume and self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=self.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        self.steps = int((self.args.tokens or self.preset.tokens) / self.preset.step_tokens)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row to the log, and prints it."""
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def batches(self) -> DataLoader[Batch]:
        """Batches from the current step on, prepared ahead by worker processes."""
        data = Batches(self.preset, str(self.tokenizer_file), self.args.seed, self.steps, self.step)
        workers = self.args.workers
        return DataLoader(
            data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
        )

    def train(self) -> bool:
        """Trains until the end or the time limit; True when the run is complete."""
        loss_of = self._compile()
        started = shown = time.monotonic()
        trained = 0
        for ids, weights in self.batches():
            clock = (time.monotonic() - started) / self.args.seconds
            if clock >= 1:
                return True
            rate = learning_rate(self.preset, self.step, self.steps, clock)
            loss = self.optimize(ids, weights, loss_of, rate)
            self.step += 1
            trained += ids.numel()
            if self.step % 100 == 0:
                now = time.monotonic()
                self.write(
                    {
                        "step": self.step,
                        "tokens": self.step * self.preset.step_tokens,
                        "loss": round(float(loss.detach()), 4),
                        "lr": round(rate, 6),
                        "length": ids.shape[1],
                        "tokens_per_second": round(trained / (now - shown)),
                        "seconds": round(now - started, 1),
                    }
                )
                shown, trained = now, 0
            if self.step % self.args.evaluate == 0:
                self.evaluate(8)
                shown = time.monotonic()
            if time.monotonic() - started > self.args.minutes * 60:
                return self.step >= self.steps
        return True

    def _compile(self) -> Loss:
        """Compiles the layers and the loss on CUDA, where it pays; returns the loss."""
        if self.device != "cuda":
            return weighted_loss
        torch.backends.cuda.matmul.allow_tf32 = True
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)
        return torch.compile(weighted_loss, dynamic=False)

    def optimize(
        self, ids: torch.Tensor, weights: torch.Tensor, loss_of: Loss, rate: float
    ) -> torch.Tensor:
        """One step of the optimizer on one batch; returns the loss."""
        ids = ids.to(self.device, non_blocking=True).long()
        weights = weights.to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.model(input_ids=ids, use_cache=False).logits
        loss = loss_of(logits, ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def evaluate(self, samples: int) -> None:
        """Logs exact recall at every length of the plan, on documents that training never sees."""
        lengths = sorted({n for _, shares in self.preset.stages for n in shares})
        self.model.eval()  # type: ignore[no-untyped-call]
        for length in lengths:
            # Every document has its own length; compiling for each would use up the limit on
            # recompilations, and later training lengths would run uncompiled.
            with torch.compiler.set_stance("force_eager"):
                found = recall(self.model, self.sampler, length, samples, self.device)
            self.write({"step": self.step, "length": length, "recall": found})
        self.model.train()

    def save_checkpoint(self) -> None:
        """Saves everything a resumed run needs."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, self.checkpoint)

    def publish(self) -> None:
        """Writes the model for `from_pretrained`: bf16 weights, tokenizer, chat template."""
        from transformers import PreTrainedTokenizerFast

        target = self.out / "model"
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=self.tokenizer,
            eos_token=END,
            pad_token=PAD,
            additional_special_tokens=[START],
            model_max_length=self.model.config.max_position_embeddings,
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(target)
        for config in (self.model.config, self.model.generation_config):
            config.eos_token_id = special_id(self.tokenizer, END)
            config.pad_token_id = special_id(self.tokenizer, PAD)
        self.model.to(torch.bfloat16)  # type: ignore[arg-type]
        self.model.save_pretrained(target)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m amcli.trainer.train", description=__doc__)
    parser.add_argument("--out", default=".train/pocket", help="folder for checkpoint, log, model")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="pocket")
    parser.add_argument("--tokens", type=float, help="length of the run (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end by then, if not done")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop and keep a checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--workers", type=int, default=12, help="processes that make documents")
    parser.add_argument("--evaluate", type=int, default=500, help="steps between evaluations")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains, saves checkpoints, measures recall and writes the model to `--out`/model."""
    run = Run(arguments(argv))
    run.prepare()
    done = run.train()
    run.save_checkpoint()
    run.evaluate(16)
    run.publish()
    run.write({"step": run.step, "steps": run.steps, "complete": done})


if __name__ == "__main__":
    main()
