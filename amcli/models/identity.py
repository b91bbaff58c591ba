"""Identify a model and tokenizer by hashes that survive a move.

The same model loaded from another path, in another dtype or by another version of transformers
has the same hashes; another vocabulary, chat template or architecture changes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

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


def config_hash(config: PreTrainedConfig) -> str:
    """`sha256:…` of the configuration, without volatile fields and those at their defaults.

    Leaving defaults out makes the hash independent of fields that later versions add.
    """
    return _hash(canonical_json(_essence(config)))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """`sha256:…` of vocabulary, merges, normalisation and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # state of the last call, not of the tokenizer
            content.pop(name, None)
    else:
        content = {"vocabulary": tokenizer.get_vocab()}
    content["special"] = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    content["special"].pop("pad_token", None)
    return _hash(canonical_json(content))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """`sha256:…` of the chat template's text; None for a tokenizer without one."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    return _hash(template if isinstance(template, str) else canonical_json(template))


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces, UTF-8: one text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def differences(
    file_model: Mapping[str, Any],
    file_tokenizer: Mapping[str, Any],
    model: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
) -> list[str]:
    """What differs between a manifest's `model` and `tokenizer` and a loaded model's, in words.

    Paths, revisions and dtypes may differ; architecture, configuration, RoPE, layers, tokenizer
    and chat template may not. An empty list means that the artifact fits.
    """
    found = []
    if file_model["architecture"] != model["architecture"]:
        found.append(_differs("architecture", file_model["architecture"], model["architecture"]))
    found += _layer_differences(file_model["layers"], model["layers"])
    if file_model["config_hash"] != model["config_hash"] and file_model["rope"] != model["rope"]:
        # RoPE is part of the configuration, and so of its hash; naming it says more.
        found.append(
            _differs("RoPE", canonical_json(file_model["rope"]), canonical_json(model["rope"]))
        )
    pairs = (
        ("config hash", file_model["config_hash"], model["config_hash"]),
        ("tokenizer", file_tokenizer["hash"], tokenizer["hash"]),
        ("chat template", file_tokenizer["template_hash"], tokenizer["template_hash"]),
    )
    return found + [_differs(*pair) for pair in pairs if pair[1] != pair[2]]


def _layer_differences(
    file_layers: list[Mapping[str, Any]], layers: list[Mapping[str, Any]]
) -> list[str]:
    if len(file_layers) != len(layers):
        return [_differs("layers", len(file_layers), len(layers))]
    for i, (theirs, ours) in enumerate(zip(file_layers, layers, strict=True)):
        for field in ("type", "kv_heads", "key_dim", "value_dim", "window"):
            if theirs.get(field) != ours.get(field):
                return [_differs(f"layer {i} {field}", theirs.get(field), ours.get(field))]
    return []


def _differs(what: str, file: Any, model: Any) -> str:
    return f"{what}: file {_short(file)}, model {_short(model)}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = str(value)
    return f"{text[:15]}…" if text.startswith("sha256:") else text


def _essence(config: PreTrainedConfig) -> dict[str, Any]:
    values = config.to_dict()
    try:
        defaults = type(config)().to_dict()
    except (TypeError, ValueError, AttributeError):
        defaults = {}  # some configurations cannot be made without arguments
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in _VOLATILE or name.startswith("_") or _is_from_gguf(name, value):
            continue
        part = vars(config).get(name)  # not getattr, which raises where layers differ
        if isinstance(part, PreTrainedConfig):
            kept[name] = _essence(part)
        elif name not in defaults or value != defaults[name]:
            kept[name] = value
    kept["model_type"] = config.model_type
    return kept


def _is_from_gguf(name: str, value: Any) -> bool:
    """Whether it is transformers' note of the GGUF file it read, with the file's path."""
    return name == "quantization_config" and dict(value or {}).get("quant_method") == "gguf"


def _hash(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
