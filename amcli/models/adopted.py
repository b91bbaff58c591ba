"""Makes a model that the caller has loaded ready for compact caches, and gives it back."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from amcli.errors import UsageError
from amcli.models.attention import NAME, register
from amcli.models.calling import translate, widen_states
from amcli.models.failures import quiet
from amcli.models.geometry import ModelGeometry, refuse_unsupported
from amcli.models.identity import identify
from amcli.models.lengths import forget_lengths
from amcli.models.loading import LoadedModel
from amcli.models.probe import probe
from amcli.models.template import ChatTemplate

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase
"""Types that callers of the Python API pass in, named without importing transformers."""

_before: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""Attribute that keeps the model's original attention."""

_probed: WeakKeyDictionary[PreTrainedModel, ModelGeometry] = WeakKeyDictionary()


def adopt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> LoadedModel:
    """The same model with amkv's attention (`release` undoes this), and what artifacts say of it.

    tokenizer  the model's own; None: loaded from where the model came from

    Weights, device and dtype stay as they are; the model is put into eval mode, since its
    attention has no dropout. Raises UsageError for a model that cannot work with a compact cache,
    and where there is no tokenizer.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"{type(model).__name__} is not a transformers model",
            "give what AutoModelForCausalLM.from_pretrained returns",
            code="not-a-model",
            field="model",
        )
    refuse_unsupported(model.config)
    name = model.name_or_path or type(model).__name__
    found = tokenizer or _tokenizer(name)
    register()
    model.train(False)
    _switch(model)
    geometry = _geometry(model)
    generation = getattr(model.generation_config, "eos_token_id", None)
    chat = ChatTemplate(found, generation)
    return LoadedModel(
        model=model,
        tokenizer=found,
        id=name,
        revision=getattr(model.config, "_commit_hash", None),
        geometry=geometry,
        device=geometry.devices[0] if geometry.devices else model.device,
        dtype=model.dtype,
        identity=identify(model, model.config, chat),
        chat=chat,
    )


def release(model: PreTrainedModel) -> None:
    """Gives a model back the attention it had before `adopt`; does nothing to any other model."""
    before = _before.pop(model, None)
    if before is not None:
        model.set_attn_implementation(before)


def _switch(model: PreTrainedModel) -> None:
    before = model.config.get_text_config(decoder=True)._attn_implementation
    if before != NAME:
        model.set_attn_implementation(NAME)
        _before[model] = before


def _geometry(model: PreTrainedModel) -> ModelGeometry:
    """Found once: the hooks on what the model is called with must not be installed twice."""
    if model not in _probed:
        forget_lengths(model)
        translate(model)
        with torch.no_grad():
            _probed[model] = probe(model)
        if _probed[model].states:
            widen_states(model)
    return _probed[model]


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UsageError(
            f"no tokenizer was found at {name!r}",
            "attach(model, tokenizer) takes one",
            code="tokenizer-missing",
            field="tokenizer",
            model=name,
        ) from error
    return found
