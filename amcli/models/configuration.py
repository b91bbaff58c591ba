"""Which keys of a configuration decide what a model computes, and which of them differ.

A file holds everything that its model's configuration says (`said`). Only what the model reads is
compared: keys that its configuration class declares or its code mentions, without those that have
a part in training or generation alone. Anything else that somebody put into a `config.json`, such
as settings of other programs, changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

# Fields that say how a model was loaded or saved, not which model it is.
_VOLATILE = frozenset(
    {
        "architectures",
        "attn_implementation",
        "auto_map",
        "dtype",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

# Fields that are declared, but have no part in computing keys, values and logits: training, other
# heads, what `generate` does, and what the layers' types and windows say in full.
_IDLE = frozenset(
    {
        "bos_token_id",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "eos_token_id",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "label2id",
        "max_window_layers",
        "model_type",  # the architecture says it
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "router_z_loss_coef",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "use_sliding_window",
    }
)
_IDLE_PARTS = ("dropout", "pdrop", "summary_")

# Code that reads configurations of every model.
_SHARED = ("transformers.modeling_rope_utils", "transformers.masking_utils")

_QUANTIZED = ("quant_method", "bits", "load_in_4bit", "load_in_8bit")
"""What counts of a quantizer's configuration: it is full of settings, and has its weights."""

_LONGEST = 4096
"""Characters of a value in JSON; of a longer one, a file holds the hash."""

_SHOWN = 60


class Difference(NamedTuple):
    """A key, with those of the objects around it, and what both sides say."""

    key: str
    file: Any
    model: Any


def essence(config: PreTrainedConfig, *, read: bool = False) -> dict[str, Any]:
    """The configuration without volatile fields and those at their defaults.

    read  also without keys that the model does not know
    """
    values, defaults = config.to_dict(), _defaults(config)
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in _VOLATILE or name.startswith("_") or _is_from_gguf(name, value):
            continue
        part = vars(config).get(name)  # not getattr, which raises where layers differ
        if isinstance(part, PreTrainedConfig):
            kept[name] = essence(part, read=read)
        elif name in defaults:
            if value != defaults[name]:
                kept[name] = value
        elif not read or _mentioned(config, name):
            kept[name] = value
    kept["model_type"] = config.model_type
    return kept


def said(config: PreTrainedConfig) -> dict[str, Any]:
    """The essence as a file holds it: JSON without what a manifest cannot hold."""
    found: dict[str, Any] = _plain(essence(config))
    return {name: _short(value) for name, value in found.items()}


def differences(
    file: Mapping[str, Any], model: Mapping[str, Any], config: PreTrainedConfig
) -> list[Difference]:
    """Where what two models have `said` differs, as far as it decides what they compute.

    config  that of the model: it knows which keys are read, and what absent ones stand for
    """
    return list(_differing(file, model, config, ""))


def shown(value: Any) -> str:
    """A value in one short line."""
    text = "none" if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _differing(
    file: Mapping[str, Any], model: Mapping[str, Any], config: PreTrainedConfig, path: str
) -> Iterator[Difference]:
    text, defaults = config.get_text_config(decoder=True), _defaults(config)
    for name in sorted(file.keys() | model.keys()):
        part = vars(config).get(name)
        if isinstance(part, PreTrainedConfig):
            # A model that also sees has other parts, which a document does not go through.
            if text is config or part.get_text_config(decoder=True) is text:
                theirs, ours = (_object(x.get(name)) for x in (file, model))
                yield from _differing(theirs, ours, part, f"{path}{name}.")
        elif _decides(config, name, defaults):
            absent = _short(_plain(defaults.get(name)))
            theirs, ours = (_read(config, name, x.get(name, absent)) for x in (file, model))
            yield from _leaves(f"{path}{name}", theirs, ours)


def _decides(config: PreTrainedConfig, name: str, defaults: Mapping[str, Any]) -> bool:
    if name in _VOLATILE or name in _IDLE or any(part in name for part in _IDLE_PARTS):
        return False
    if name == "max_position_embeddings" and _plain_rope(config):
        return False  # how long texts may be, not what they give
    return name == "quantization_config" or name in defaults or _mentioned(config, name)


def _read(config: PreTrainedConfig, name: str, value: Any) -> Any:
    """What is read of a value that is an object which anything can be put into."""
    if name == "quantization_config":
        return {key: _object(value).get(key) for key in _QUANTIZED}
    if name != "rope_parameters" or not isinstance(value, dict):
        return value
    return {
        key: _read(config, name, item)
        for key, item in value.items()
        if isinstance(item, dict) or _mentioned(config, key)
    }


def _leaves(path: str, file: Any, model: Any) -> Iterator[Difference]:
    """The innermost values that differ."""
    if isinstance(file, dict) and isinstance(model, dict):
        for name in sorted(file.keys() | model.keys()):
            yield from _leaves(f"{path}.{name}", file.get(name), model.get(name))
    elif isinstance(file, list) and isinstance(model, list) and len(file) == len(model):
        for i, pair in enumerate(zip(file, model, strict=True)):
            yield from _leaves(f"{path}[{i}]", *pair)
    elif file != model:
        yield Difference(path, file, model)


def _defaults(config: PreTrainedConfig) -> Mapping[str, Any]:
    kind: Any = type(config)
    return _of_class(kind)


@cache
def _of_class(kind: Any) -> Mapping[str, Any]:
    try:
        found: dict[str, Any] = kind().to_dict()
    except (TypeError, ValueError, AttributeError):
        return {}  # some configurations cannot be made without arguments
    return found


def _mentioned(config: PreTrainedConfig, name: str) -> bool:
    """Whether a key that the class does not declare is read by the model's code all the same."""
    if not _defaults(config):
        return True  # a class that cannot be asked what it declares
    word = re.compile(rf"\bconfig\.{re.escape(name)}\b|[\"']{re.escape(name)}[\"']")
    home = type(config).__module__
    beside = home.rpartition(".")[0] or home
    for module, code in list(sys.modules.items()):
        package, _, stem = module.rpartition(".")
        read = module in (home, *_SHARED) or (package == beside and stem.startswith("modeling"))
        if read and word.search(_source(vars(code).get("__file__"))):
            return True
    return False


@cache
def _source(file: str | None) -> str:
    """The text of a module; empty where there is none to be had."""
    try:
        return Path(file or "").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _plain_rope(config: PreTrainedConfig) -> bool:
    """Whether RoPE is there and knows nothing of how long texts may be."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict) or not found:
        return False
    sets = [part for part in found.values() if isinstance(part, dict)] or [found]
    return all(part.get("rope_type", "default") == "default" for part in sets)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> Any:
    """The value as JSON has it, in what a manifest takes."""
    if isinstance(value, Mapping):
        return {_text(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _text(str(value))


def _text(text: str) -> str:
    """Text without characters that a manifest refuses, which are written as escapes."""
    return re.sub(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda c: f"\\u{ord(c[0]):04x}", text
    )


def _short(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    deep = len(text) > _LONGEST or _depth(value) > 16
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest() if deep else value


def _depth(value: Any) -> int:
    if isinstance(value, (dict, list)):
        return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)
    return 0


def _is_from_gguf(name: str, value: Any) -> bool:
    """Whether it is transformers' note of the GGUF file it read, with the file's path."""
    return name == "quantization_config" and dict(value or {}).get("quant_method") == "gguf"
