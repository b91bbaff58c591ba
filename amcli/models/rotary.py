"""RoPE of a loaded model: rotate queries and keys to other positions, or undo the rotation.

Models lay out the rotated channels in many ways (halves, neighbours, only some of them) and leave
some layers without RoPE. Both are taken from the model: its rotary module gives cosines and
sines, its own modelling file applies them, and a probe finds out whether a layer does. Rotation
is linear in (cos, sin), so the inverse and the mean over positions need nothing else.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from amcli.errors import UsageError
from amcli.models.cache import CompactCache
from amcli.models.calling import run
from amcli.models.geometry import ModelGeometry, decoder_of
from amcli.models.layer import CompactLayer
from amcli.models.lengths import changes_with_length

_PROBED_POSITION = 37
_OTHER = "choose another method, such as omp"

Apply = Callable[..., Any]


class Rotary:
    """The rotations of a model's layers.

    Raises UsageError when no RoPE can be found in the model, when the model applies it in a way its
    rotary module does not explain, or changes its frequencies with the length of the text.
    """

    def __init__(self, model: PreTrainedModel, geometry: ModelGeometry) -> None:
        kind = changes_with_length(model)
        if kind is not None:
            raise UsageError(
                f"{geometry.architecture} has {kind} RoPE, whose frequencies change with the "
                "length, and this method needs to turn keys",
                _OTHER,
                code="rope-changes-with-length",
                field="method",
                rope=kind,
            )
        module = getattr(decoder_of(model), "rotary_emb", None)
        apply = apply_function(model)
        if module is None or apply is None:
            raise _unknown(geometry)
        self._module = module
        self._apply = apply
        self._device = model.device
        self._types = _layer_types(model, module, geometry)
        self._plain = _layers_without(self, model, geometry)

    def rotate(self, layer: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`x [..., m, d]` before RoPE, rotated to `positions [m]`; float32."""
        return self._turn(layer, x, *self._angles(layer, positions))

    def unrotate(self, layer: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`x [..., m, d]` at `positions [m]`, as it was before RoPE; float32."""
        cos, sin = self._angles(layer, positions)
        # Some kinds of RoPE scale the rotation: divide by the square of that scale.
        size = cos.square() + sin.square()
        return self._turn(layer, x, cos / size, -sin / size)

    def mean(self, layer: int, positions: torch.Tensor, dim: int) -> torch.Tensor:
        """`[d, d]` float32: the mean rotation over `positions`, as a matrix on column vectors."""
        cos, sin = self._angles(layer, positions)
        rows = torch.eye(dim, device=self._device)
        mean = (cos.mean(1, keepdim=True), sin.mean(1, keepdim=True))
        return self._turn(layer, rows, *(x.expand(-1, dim, -1) for x in mean)).T

    def _angles(self, layer: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[1, m, channels]`, float32."""
        like = torch.empty(0, dtype=torch.float32, device=self._device)
        where = positions.to(self._device).unsqueeze(0)
        kind = self._types[layer]
        found = self._module(like, where, *(() if kind is None else (kind,)))
        return found[0], found[1]

    def _turn(
        self, layer: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        x = x.float()
        if layer in self._plain:
            return x
        cos, sin = cos.to(x.device), sin.to(x.device)  # layers may be on several devices
        flat = x.reshape(1, -1, *x.shape[-2:])  # [1, heads, m, d], as the models have it
        try:
            turned = self._applied(flat, cos, sin)
        except RuntimeError:
            # Some models split off the channels that RoPE rotates before they apply it.
            cut = cos.shape[-1]
            turned = self._applied(flat[..., :cut], cos, sin)
            turned = torch.cat([turned, flat[..., cut:]], dim=-1)
        return turned.reshape(x.shape)

    def _applied(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotated by the model's own function, which takes queries and keys, or one of them."""
        if "k" in inspect.signature(self._apply).parameters:
            return cast(torch.Tensor, self._apply(x, x[:, :1], cos, sin)[0])
        return cast(torch.Tensor, self._apply(x, cos, sin))

    _plain: frozenset[int] = frozenset()


def apply_function(model: PreTrainedModel) -> Apply | None:
    """`apply_rotary_pos_emb` of the file that the model's attention is written in."""
    for module in decoder_of(model).modules():
        if type(module).__name__.endswith("Attention"):
            file = sys.modules[type(module).__module__]
            return cast("Apply | None", getattr(file, "apply_rotary_pos_emb", None))
    return None


def _layer_types(
    model: PreTrainedModel, module: torch.nn.Module, geometry: ModelGeometry
) -> list[str | None]:
    """The argument by which a rotary module tells layers apart, if it does."""
    if "layer_type" not in inspect.signature(module.forward).parameters:
        return [None] * len(geometry.layers)
    kinds = model.config.get_text_config(decoder=True).layer_types
    return [kind for place, kind in enumerate(kinds) if place not in geometry.states]


def _layers_without(
    rotary: Rotary, model: PreTrainedModel, geometry: ModelGeometry
) -> frozenset[int]:
    """Layers that do not rotate; UsageError where a layer neither rotates nor leaves queries alone.

    A single token attends only to itself, whatever its position, so its hidden states are the same
    at every position, and so are its queries before RoPE.
    """
    start, end = (_queries(model, geometry, p) for p in (0, _PROBED_POSITION))
    places = [torch.tensor([p], device=model.device) for p in (0, _PROBED_POSITION)]
    plain = set()
    for layer in range(len(geometry.layers)):
        turned = rotary.rotate(layer, rotary.unrotate(layer, start[layer], places[0]), places[1])
        if _close(start[layer], end[layer]):
            plain.add(layer)
        elif not _close(turned, end[layer]):
            raise _unknown(geometry)
    return frozenset(plain)


@torch.no_grad()
def _queries(
    model: PreTrainedModel, geometry: ModelGeometry, position: int
) -> dict[int, torch.Tensor]:
    """Each layer's queries `[Hq, 1, d]` of a single token at `position`."""
    found: dict[int, torch.Tensor] = {}

    def look(
        index: int, query: torch.Tensor, layer: CompactLayer, scaling: Any, softcap: Any
    ) -> None:
        found[index] = query[0].float()

    cache = CompactCache.empty(geometry)
    ids = torch.ones((1, 1), dtype=torch.long, device=model.device)
    where = torch.full_like(ids, position)
    with cache.observe(look):
        run(decoder_of(model), cache, ids, position_ids=where)
    return found


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of 16-bit models."""
    return bool((a - b).norm() <= 0.02 * b.norm())


def _unknown(geometry: ModelGeometry) -> UsageError:
    return UsageError(
        f"the rotary position embedding of {geometry.architecture} could not be found, "
        "and this method needs it",
        _OTHER,
        code="rope-unknown",
        field="method",
    )
