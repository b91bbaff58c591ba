"""Parts of a model in one launch each, in place of transformers' own code while a step is captured.

A part is replaced only if the kernel gives what the part itself gives on a trial, so models need no
list here. What is not found, or fails its trial, stays as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from amcli.kernels.fused import Fused

KERNELS = Fused("elementwise", "amcli.kernels.elementwise")

DEVICES = {"cuda"}
"""Kinds of devices on which kernels take the place of parts."""

KINDS = range(3)
"""What norms may do with their weights; see the kernels."""

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_ROTATION = "apply_rotary_pos_emb"

Swap = tuple[Any, str, Callable[..., Any]]
"""An object, the name of one of its attributes, and what replaces it."""

_swaps: WeakKeyDictionary[PreTrainedModel, list[Swap]] = WeakKeyDictionary()


@contextmanager
def quick(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, a model runs on kernels where they do the same, found at the first use."""
    if model.device.type not in DEVICES or model.dtype not in _TOLERANCE:
        yield
        return
    if model not in _swaps:
        _swaps[model] = swaps(model)
    before = []
    try:
        for owner, name, new in _swaps[model]:
            before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, old in before:
            if old is None:
                delattr(owner, name)  # the method of the class is seen again
            else:
                setattr(owner, name, old)


@torch.no_grad()
def swaps(model: PreTrainedModel) -> list[Swap]:
    """What can be replaced in a model, by trial: one for each class, shape and dtype of parts."""
    if KERNELS.module() is None:
        return []
    found: list[Swap] = []
    kinds: dict[Any, int | None] = {}
    for module in model.modules():
        if "forward" in vars(module):  # what others have replaced
            continue
        if _is_norm(module):
            weight = _parameter(module, "weight")
            key: Any = (type(module), weight.shape, weight.dtype)
            if key not in kinds:
                kinds[key] = _kind_of_norm(module, model.dtype)
            if kinds[key] is not None:
                found.append((module, "forward", _norm(module, model.dtype, kinds[key])))
        elif _is_gated(module):
            key = type(module), type(module.act_fn), type(module.gate_proj)
            if key not in kinds:
                kinds[key] = _gates(module, model.dtype)
            if kinds[key] is not None:
                found.append((module, "forward", _gated(module)))
    for name in sorted({type(module).__module__ for module in model.modules()}):
        original = getattr(sys.modules.get(name), _ROTATION, None)
        if original is not None and _rotates(original, model):
            found.append((sys.modules[name], _ROTATION, _rotated(original)))
    return found


def _close(found: torch.Tensor | None, wanted: torch.Tensor) -> float | None:
    """The largest error as a share of the largest number; None if it is too large."""
    if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return None
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    return error if error < _TOLERANCE[wanted.dtype] else None


def _random(*shape: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (2 * torch.randn(shape, generator=generator) + 0.3).to(like.device, dtype)


def _arguments(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _parameter(module: torch.nn.Module, name: str) -> torch.Tensor:
    parameter: torch.Tensor = getattr(module, name)
    return parameter


# ---- norms -------------------------------------------------------------------------------------


def _is_norm(module: torch.nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        "norm" in type(module).__name__.lower()
        and not isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm))
        and weight is not None
        and weight.ndim == 1
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and isinstance(_eps(module), float)
        and len(_arguments(module.forward)) == 1
    )


def _eps(module: torch.nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _kind_of_norm(module: torch.nn.Module, dtype: torch.dtype) -> int | None:
    """How a norm treats its weights; None if it is not an RMS norm."""
    weight, eps = _parameter(module, "weight"), _eps(module)
    x = _random(3, weight.shape[0], like=weight, dtype=dtype)
    try:
        wanted = module(x)
    except Exception:  # it wants something else, and stays as it is
        return None
    errors = {}
    for kind in KINDS:
        error = _close(KERNELS.run(x, _normed(x, weight, eps, kind)), wanted)
        if error is not None:
            errors[kind] = error
    return min(errors, key=errors.__getitem__, default=None)


def _normed(
    x: torch.Tensor, weight: torch.Tensor, eps: float, kind: int
) -> Callable[[Any], torch.Tensor]:
    return lambda kernels: kernels.norm(x, weight, eps, kind)


def _norm(module: torch.nn.Module, dtype: torch.dtype, kind: int | None) -> Callable[..., Any]:
    kernels, eps = KERNELS.module(), _eps(module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = _parameter(module, "weight")  # as it is now
        if x.dtype != dtype or x.shape[-1] != weight.shape[0]:
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        return kernels.norm(x, weight, eps, kind)  # type: ignore[no-any-return,union-attr]

    return forward


# ---- gates -------------------------------------------------------------------------------------


def _is_gated(module: torch.nn.Module) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj")
    return (
        all(isinstance(getattr(module, name, None), torch.nn.Linear) for name in parts)
        and "silu" in type(getattr(module, "act_fn", None)).__name__.lower()
        and len(_arguments(module.forward)) == 1
    )


def _gates(module: Any, dtype: torch.dtype) -> int | None:
    """1 if a gate and what it lets through are all there is; otherwise None."""
    x = _random(1, 1, module.gate_proj.in_features, like=module.gate_proj.weight, dtype=dtype)
    try:
        wanted = module(x)
    except Exception:  # it wants something else, and stays as it is
        return None
    error = _close(KERNELS.run(x, lambda kernels: _gated(module)(x)), wanted)
    return None if error is None else 1


def _gated(module: Any) -> Callable[..., Any]:
    kernels: Any = KERNELS.module()

    def forward(x: torch.Tensor) -> Any:
        return module.down_proj(kernels.gated(module.gate_proj(x), module.up_proj(x)))

    return forward


# ---- rotations ---------------------------------------------------------------------------------


def _rotates(original: Callable[..., Any], model: PreTrainedModel) -> bool:
    """Whether a function turns the halves of whole heads into each other."""
    if _arguments(original) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    like = next(model.parameters())
    shapes = (2, 4, 3, 16), (2, 2, 3, 16), (1, 3, 16), (1, 3, 16)
    parts = [_random(*shape, like=like, dtype=model.dtype) for shape in shapes]
    parts[3] = parts[3].flip(2).contiguous()
    try:
        wanted = original(*parts)
    except Exception:  # it wants something else, and stays as it is
        return False
    found = KERNELS.run(like, lambda kernels: kernels.rotate(*parts))
    return found is not None and all(
        _close(x, y) is not None for x, y in zip(found, wanted, strict=True)
    )


def _rotated(original: Callable[..., Any]) -> Callable[..., Any]:
    kernels: Any = KERNELS.module()

    def apply(q: Any, k: Any, cos: Any, sin: Any, *rest: Any, **more: Any) -> Any:
        if rest or more or q.ndim != 4 or not kernels.can_rotate(q, k, cos, sin):
            return original(q, k, cos, sin, *rest, **more)
        return kernels.rotate(q, k, cos, sin)

    return apply
