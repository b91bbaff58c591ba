"""Identify a model and tokenizer by what survives a move.

The same model loaded from another path, in another dtype or by another version of transformers
is the same; another vocabulary, chat template, architecture, configuration or weights are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from amcli.models import configuration, weights
from amcli.models.configuration import essence, said, shown
from amcli.models.sharding import Shard
from amcli.models.template import ChatTemplate
from amkv_format import compare_weights


@dataclass(frozen=True)
class Identity:
    """What tells a model from others, as a manifest has it.

    config   what its configuration says; see `configuration.said`
    weights  numbers out of its weights; see `weights.sample`
    turns_hash  of what its chat template does; None without one
    """

    config_hash: str
    config: Mapping[str, Any]
    weights: Mapping[str, str]
    tokenizer_hash: str
    template_hash: str | None
    turns_hash: str | None

    def model(self) -> dict[str, Any]:
        """Its fields of a manifest's `model`."""
        return {
            "config_hash": self.config_hash,
            "config": dict(self.config),
            "weights": dict(self.weights),
        }

    def tokenizer(self) -> dict[str, Any]:
        """A manifest's `tokenizer`."""
        found = {"hash": self.tokenizer_hash, "template_hash": self.template_hash}
        return found if self.turns_hash is None else found | {"turns_hash": self.turns_hash}


def identify(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    chat: ChatTemplate,
    shard: Shard | None = None,
) -> Identity:
    """The identity of a loaded model; called by all processes of a `shard` of several.

    config  its configuration as it was read
    """
    turns = chat.turns()
    return Identity(
        config_hash(config),
        said(config),
        weights.sample(model, shard),
        tokenizer_hash(chat.tokenizer),
        template_hash(chat.tokenizer),
        None if turns is None else _hash(canonical_json(turns)),
    )


def config_hash(config: PreTrainedConfig) -> str:
    """`sha256:…` of the configuration, without volatile fields and those at their defaults.

    Leaving defaults out makes the hash independent of fields that later versions add.
    """
    return _hash(canonical_json(essence(config)))


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
    config: PreTrainedConfig,
) -> list[str]:
    """What differs between a manifest's `model` and `tokenizer` and a loaded model's, in words.

    Paths, revisions and dtypes may differ; architecture, layers, weights, tokenizer, and what is
    read of configuration and chat template may not. An empty list means that the artifact fits.
    """
    found = []
    if file_model["architecture"] != model["architecture"]:
        found.append(_differs("architecture", file_model["architecture"], model["architecture"]))
    found += _layer_differences(file_model["layers"], model["layers"])
    found += _config_differences(file_model, model, config)
    compared = compare_weights(file_model.get("weights"), model["weights"])
    if compared.differing:
        found.append(
            f"weights: {compared.differing:,} of {compared.compared:,} numbers differ, such as in "
            f"{compared.example}"
        )
    if file_tokenizer["hash"] != tokenizer["hash"]:
        found.append(_differs("tokenizer", file_tokenizer["hash"], tokenizer["hash"]))
    theirs, ours = file_tokenizer["template_hash"], tokenizer["template_hash"]
    turns = file_tokenizer.get("turns_hash")
    if theirs != ours and (turns is None or turns != tokenizer.get("turns_hash")):
        found.append(_differs("chat template", theirs, ours))
    return found


def untold(file_model: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """What a file does not say of its model, so that nobody can tell whether it is the same."""
    compared = compare_weights(file_model.get("weights"), model["weights"]).compared
    return [] if compared else ["weights"]


def _config_differences(
    file: Mapping[str, Any], model: Mapping[str, Any], config: PreTrainedConfig
) -> list[str]:
    if "config" in file:
        return [
            f"configuration {key}: file {shown(theirs)}, model {shown(ours)}"
            for key, theirs, ours in configuration.differences(
                file["config"], model["config"], config
            )
        ]
    # A file that only has the hash: of all keys, perhaps before some were added that do nothing.
    if file["config_hash"] in (
        model["config_hash"],
        _hash(canonical_json(essence(config, read=True))),
    ):
        return []
    found = []
    if file["rope"] != model["rope"]:
        # RoPE is part of the configuration, and so of its hash; naming it says more.
        found.append(_differs("RoPE", canonical_json(file["rope"]), canonical_json(model["rope"])))
    hashes = _differs("config hash", file["config_hash"], model["config_hash"])
    return [*found, f"{hashes} (the file has no more than the hash, so no key can be named)"]


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


def _hash(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
