"""How a model is given its cache: the argument's name, which transformers has changed.

Up to 5.23 it is `past_key_values`; 5.24 calls it `cache`, and 5.40 will not know the old name. The
code that a model brings may be older than the transformers that runs it. So a call goes by what the
model's own `forward` takes, and `generate` by the installed version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from transformers import GenerationMixin

from amcli.models.geometry import decoder_of

NAMES = ("cache", "past_key_values")


def _name_in(function: Callable[..., Any]) -> str | None:
    # A decorator that still accepts the old name hides behind the signature of what it wraps.
    taken = inspect.signature(function).parameters
    return next((name for name in NAMES if name in taken), None)


GENERATE = _name_in(GenerationMixin.prepare_inputs_for_generation) or NAMES[0]
"""What `model.generate` of the installed transformers calls the cache."""


_names: dict[type, str] = {}


def _name_of(module: Any) -> str:
    """What a model's own code calls the cache, looked up once for each class."""
    kind = type(module)
    if kind not in _names:
        _names[kind] = _name_in(kind.forward) or GENERATE
    return _names[kind]


def run(module: torch.nn.Module, cache: Any, ids: torch.Tensor, **options: Any) -> Any:
    """One forward pass over `ids [B, m]` of a model, or of its decoder, on a cache."""
    return module(input_ids=ids, use_cache=True, **{_name_of(module): cache}, **options)


def accepts(module: torch.nn.Module, name: str) -> bool:
    """Whether a model's `forward` has an argument of that name."""
    return name in inspect.signature(type(module).forward).parameters


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model's `forward`; None if there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def translate(model: Any) -> None:
    """Let `generate` reach a model whose own code takes the cache by its old name.

    Without that, such code never sees the cache, and answers as if there were no document.
    """
    name = _name_of(model)
    if name != GENERATE:
        model.register_forward_pre_hook(
            lambda _, args, given: (args, _renamed(given, name)), with_kwargs=True
        )
    prepare = model.prepare_inputs_for_generation
    own = _name_in(prepare)
    if own is None or own == GENERATE:
        return

    @wraps(prepare)
    def prepared(*args: Any, **given: Any) -> Any:
        return prepare(*args, **_renamed(given, own))

    # `generate` refuses arguments that this does not name.
    said = inspect.signature(prepare)
    taken = [x.replace(name=GENERATE) if x.name == own else x for x in said.parameters.values()]
    prepared.__signature__ = said.replace(parameters=taken)  # type: ignore[attr-defined]
    model.prepare_inputs_for_generation = prepared


def widen_states(model: Any) -> None:
    """Give a cache's states a row for each of the model's inputs, before any layer reads them.

    A layer of attention sees the inputs when it appends their keys, and needs no help.
    """

    def widen(decoder: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        cache = cache_in(given)
        inputs = [given.get(name) for name in ("input_ids", "inputs_embeds")]
        rows = next((len(x) for x in (*args, *inputs) if isinstance(x, torch.Tensor)), 1)
        for state in getattr(cache, "states", ()):
            state.widen(rows)

    decoder_of(model).register_forward_pre_hook(widen, with_kwargs=True)


def _renamed(given: dict[str, Any], name: str) -> dict[str, Any]:
    cache = cache_in(given)
    kept = {key: x for key, x in given.items() if key not in NAMES}
    return kept if cache is None else {**kept, name: cache}
