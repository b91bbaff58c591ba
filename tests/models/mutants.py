"""A seeded generator of mutants of a model folder, some of which compute the same as before."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path, random.Random], None]
Weights = dict[str, torch.Tensor]


class Mutant(NamedTuple):
    """A change of a folder. `differs`: whether the model then computes something else."""

    name: str
    seed: int
    change: Change
    differs: bool

    def apply(self, folder: Path) -> None:
        self.change(folder, random.Random(self.seed))


def mutants(changes: dict[str, tuple[Change, bool]], count: int) -> list[Mutant]:
    """That many, each change about as often as any other, with other random numbers each time."""
    names = list(changes)
    return [Mutant(f"{(n := names[i % len(names)])}-{i}", i, *changes[n]) for i in range(count)]


# ---- weights -----------------------------------------------------------------------------------


def weights(change: Callable[[Weights, random.Random], Any]) -> Change:
    def apply(folder: Path, rng: random.Random) -> None:
        tensors = {k: x.float() for k, x in load_file(folder / "model.safetensors").items()}
        torch.manual_seed(rng.randrange(2**31))
        dtype = change(tensors, rng) or torch.bfloat16
        stored = {name: x.to(dtype).contiguous() for name, x in tensors.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def disturb(tensors: Weights, names: list[str], by: float) -> None:
    for name in names:
        tensors[name] *= 1 + by * torch.randn_like(tensors[name])


def tuned(tensors: Weights, rng: random.Random) -> None:
    disturb(tensors, list(tensors), rng.choice([0.01, 0.1]))


def one_tensor(tensors: Weights, rng: random.Random) -> None:
    disturb(tensors, [rng.choice(sorted(tensors))], 0.02)


def one_layer(tensors: Weights, rng: random.Random) -> None:
    layer = f".layers.{rng.randrange(3)}."
    disturb(tensors, [name for name in tensors if layer in name], 0.02)


def adapter(tensors: Weights, rng: random.Random) -> None:
    """A low rank added to queries and values, as most adapters do."""
    for name, x in tensors.items():
        if "q_proj.weight" in name or "v_proj.weight" in name:
            x += 0.05 * x.std() * torch.randn(x.shape[0], 1) @ torch.randn(1, x.shape[1])


def sparse(tensors: Weights, rng: random.Random) -> None:
    """One number in thirty moves to the next bfloat16, as after a gentle tuning."""
    for name, x in tensors.items():
        moved = torch.rand(x.shape) < 1 / 30
        tensors[name] = torch.where(moved, x * (1 + 2**-7), x)


def other_seed(tensors: Weights, rng: random.Random) -> None:
    for x in tensors.values():
        if x.ndim == 2:
            x.copy_(torch.randn_like(x) * x.std())


def swapped(tensors: Weights, rng: random.Random) -> None:
    a, b = rng.sample(range(3), 2)
    for name in [name for name in tensors if f".layers.{a}." in name]:
        other = name.replace(f".layers.{a}.", f".layers.{b}.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def scaled_norms(tensors: Weights, rng: random.Random) -> None:
    for name, x in tensors.items():
        if "norm" in name:
            x *= 1.02


def stored_in(dtype: torch.dtype) -> Callable[[Weights, random.Random], torch.dtype]:
    return lambda tensors, rng: dtype


def in_parts(folder: Path, rng: random.Random) -> None:
    tensors = list(load_file(folder / "model.safetensors").items())
    rng.shuffle(tensors)
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for i in range(3):
        name = f"model-{i + 1:05}-of-00003.safetensors"
        part = dict(tensors[i::3])
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


WEIGHTS: dict[str, tuple[Change, bool]] = {
    "tuned": (weights(tuned), True),
    "one-tensor": (weights(one_tensor), True),
    "one-layer": (weights(one_layer), True),
    "adapter": (weights(adapter), True),
    "sparse": (weights(sparse), True),
    "other-seed": (weights(other_seed), True),
    "swapped-layers": (weights(swapped), True),
    "norms": (weights(scaled_norms), True),
    "stored-in-float32": (weights(stored_in(torch.float32)), False),
    "stored-in-float16": (weights(stored_in(torch.float16)), False),
    "in-parts": (in_parts, False),
}


# ---- JSON files --------------------------------------------------------------------------------


def edited(name: str, change: Callable[[dict[str, Any], random.Random], Any]) -> Change:
    def apply(folder: Path, rng: random.Random) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content, rng)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return apply


def config(**values: list[Any]) -> Change:
    """Fields of the configuration, each set to one of some values."""
    return edited(
        "config.json",
        lambda content, rng: content.update({k: rng.choice(v) for k, v in values.items()}),
    )


def rope(**values: Any) -> Change:
    return edited("config.json", lambda c, rng: c["rope_parameters"].update(values))


def anything(rng: random.Random) -> Any:
    """Any JSON."""
    return rng.choice(
        [False, True, None, 0, 3, 0.5, "text", [], [1, "a"], {}, {"dtype": "q4", "use": {"x": 1}}]
    )


def unknown_key(content: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice(["rope_interleaved", "unsloth_fixed", "transformers.js_config", "my_note"])
    content[name] = anything(rng)


def reordered(content: dict[str, Any], rng: random.Random) -> None:
    items = list(content.items())
    rng.shuffle(items)
    content.clear()
    content.update(items)


CONFIG: dict[str, tuple[Change, bool]] = {
    "eps": (config(rms_norm_eps=[1e-3, 1e-2, 0.1]), True),
    "unknown-key": (edited("config.json", unknown_key), False),
    "activation": (config(hidden_act=["gelu", "relu", "gelu_pytorch_tanh"]), True),
    "order": (edited("config.json", reordered), False),
    "rope-theta": (rope(rope_theta=500000.0), True),
    "training": (config(initializer_range=[0.5, 0.1], attention_dropout=[0.1, 0.2]), False),
    "rope-linear": (rope(rope_type="linear", factor=2.0), True),
    "rope-unknown-key": (rope(interleaved_by_somebody=False), False),
    "fewer-layers": (config(num_hidden_layers=[1, 2]), True),
    "generation": (config(eos_token_id=[3, [3, 4]], bos_token_id=[7, None]), False),
    "other-heads": (config(id2label=[{"0": "bad", "1": "good"}], problem_type=[None]), False),
    "saved-by": (config(transformers_version=["4.1.0"], architectures=[["X"], None]), False),
    "longer": (config(max_position_embeddings=[512, 4096]), False),
    "loading": (config(dtype=["float16", "float32"], use_cache=[False]), False),
}

WINDOWED: dict[str, tuple[Change, bool]] = {
    "window": (config(sliding_window=[3, 5]), True),
    "layer-types": (
        config(layer_types=[["full_attention"] * 3, ["sliding_attention"] * 3]),
        True,
    ),
    "softcap": (config(final_logit_softcapping=[1.0, 2.0]), True),
    "scale": (config(query_pre_attn_scalar=[2, 16]), True),
    "unknown-key": (edited("config.json", unknown_key), False),
    "theta-of-windows": (
        edited(
            "config.json",
            lambda c, rng: c["rope_parameters"]["sliding_attention"].update(rope_theta=77.0),
        ),
        True,
    ),
}
"""Of a model with windows and softcaps."""


def fewer_merges(content: dict[str, Any], rng: random.Random) -> None:
    merges = content["model"]["merges"]
    merges.pop(rng.randrange(len(merges)))


def swapped_words(content: dict[str, Any], rng: random.Random) -> None:
    vocabulary = content["model"]["vocab"]
    a, b = rng.sample([w for w in vocabulary if not w.startswith("<")], 2)
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def last_state(content: dict[str, Any], rng: random.Random) -> None:
    content["padding"] = {
        "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    content["truncation"] = {
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip


TOKENIZER: dict[str, tuple[Change, bool]] = {
    "merges": (edited("tokenizer.json", fewer_merges), True),
    "state": (edited("tokenizer.json", last_state), False),
    "words": (edited("tokenizer.json", swapped_words), True),
    "settings": (
        edited(
            "tokenizer_config.json",
            lambda c, rng: c.update(
                model_max_length=rng.choice([64, 10**30]),
                padding_side=rng.choice(["left", "right"]),
                pad_token="<|endoftext|>",
            ),
        ),
        False,
    ),
    "lower-case": (
        edited("tokenizer.json", lambda c, rng: c.update(normalizer={"type": "Lowercase"})),
        True,
    ),
    "order": (edited("tokenizer.json", reordered), False),
}


# ---- templates ---------------------------------------------------------------------------------


def template(old: str, new: str) -> Change:
    def apply(folder: Path, rng: random.Random) -> None:
        path = folder / "chat_template.jinja"
        text = path.read_text(encoding="utf-8")
        if old not in text:
            raise ValueError(f"no {old!r} in the template")
        path.write_text(text.replace(old, new), encoding="utf-8")

    return apply


LOOP = "{% for m in messages %}"

TEMPLATE: dict[str, tuple[Change, bool]] = {
    "comment": (template(LOOP, "{# of all turns #}" + LOOP), False),
    "role": (template("'<|im_start|>' + m.role", "'<|im_start|>' + m.role | upper"), True),
    "tools": (template(LOOP, "{% if tools %}{{ tools | tojson }}{% endif %}" + LOOP), False),
    "end": (template("m.content + '<|im_end|>'", "m.content + ' <|im_end|>'"), True),
    "renamed": (template("m.", "message."), True),  # without the loop: nothing is said any more
    "spaces": (template("{% for m in messages %}", "{%  for  m  in  messages  %}"), False),
    "system": (template("You are a helpful assistant.", "You are a pirate."), True),
    "prompt": (template("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n\n'"), True),
    "unused": (template(LOOP, "{% set unused = 3 %}" + LOOP), False),
    "thinking": (template("<think>\n\n</think>", "<think>\n</think>"), True),
}


def every() -> Iterator[Mutant]:
    """About a hundred, of all kinds."""
    yield from mutants(WEIGHTS, 33)
    yield from mutants(CONFIG, 30)
    yield from mutants(TOKENIZER, 14)
    yield from mutants(TEMPLATE, 12)
