"""One layer that keeps a state instead of keys and values: linear attention, an SSM, a convolution.

Such layers have nothing to compact: their state has one size, whatever the length of the text. It
is stored as it is, and copied whenever a conversation branches off. Knows transformers'
protocol for such layers (5.17 and later) and nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

STATEFUL = frozenset({"conv", "linear_attention"})
"""Configurations' names for layers with one such state."""

EMPTY = frozenset({"mlp", "moe"})
"""Configurations' names for layers that keep nothing at all."""

_CONV, _RECURRENT = "conv", "recurrent"


def placed(
    name: str, state: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A state on the device, and in the dtype, that a model in `dtype` keeps it in.

    The inputs of a convolution are in the model's dtype. A recurrent state need not be, and keeps
    its own.
    """
    return state.to(device=device, dtype=dtype if name == _CONV else state.dtype)


def selected(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The `rows` of a tensor; one that has a single row has it in all places."""
    rows = rows.to(tensor.device)
    return tensor[torch.zeros_like(rows) if tensor.shape[0] == 1 else rows]


def state_differences(
    found: Mapping[tuple[int, str], tuple[int, ...]],
    kept: Mapping[tuple[int, str], tuple[int, ...]],
) -> list[str]:
    """Why states from a file do not fit a model that keeps `kept`, the first reason; [] if they do.

    Keys are the model's layer and the name of the state, values shapes.
    """
    for layer, name in sorted(found.keys() | kept.keys()):
        theirs, wanted = found.get((layer, name)), kept.get((layer, name))
        if theirs != wanted:
            shapes = ["none" if shape is None else list(shape) for shape in (theirs, wanted)]
            return [f"state {name} of layer {layer}: file {shapes[0]}, model {shapes[1]}"]
    return []


class StateLayer(LinearAttentionLayer):
    """transformers' own layer, whose states can be taken out, put back and copied.

    `conv` holds the last inputs of a convolution `[B, channels, kernel]`, `recurrent` what the
    layer has made of all inputs; a layer has either or both.
    """

    def tensors(self) -> dict[str, torch.Tensor]:
        """The existing states, by name: copies, because the layer writes into its own."""
        return {name: state.clone() for name, state in self.held().items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from copies of these states; from the beginning if there are none."""
        conv, recurrent = tensors.get(_CONV), tensors.get(_RECURRENT)
        self.conv_states[0] = None if conv is None else conv.clone()
        self.recurrent_states[0] = None if recurrent is None else recurrent.clone()
        self.is_conv_states_initialized[0] = conv is not None
        self.is_recurrent_states_initialized[0] = recurrent is not None
        self.has_previous_state[0] = bool(tensors)
        self.conv_kernel_size[0] = None if conv is None else conv.shape[-1]
        # transformers sets both with the first state; it looks at them when moving between devices.
        first: Any = conv if conv is not None else recurrent
        self.dtype, self.device = (None, None) if first is None else (first.dtype, first.device)

    def reset(self) -> None:
        """Forget everything."""
        self.load({})

    def widen(self, batch: int) -> None:
        """Let each row go on in `batch / rows` rows; see `CompactLayer.widen`."""
        rows = max((len(state) for state in self.held().values()), default=batch)
        if rows < batch and batch % rows == 0:
            self.batch_repeat_interleave(batch // rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the batch rows `beam_idx`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows `indices`, of which a single row has any number."""
        self._replace_rows(lambda state: selected(state, indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        self._replace_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def fork(self, batch: int) -> StateLayer:
        """A layer that continues from the same states, with `batch` rows."""
        held = self.held()
        rows = {len(state) for state in held.values()}
        if not rows <= {1, batch}:
            raise ValueError(f"cannot fork {max(rows)} sequences into {batch}")
        other = StateLayer()
        other.load({name: state.expand(batch, *state.shape[1:]) for name, state in held.items()})
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(state.numel() * state.element_size() for state in self.held().values())

    def _replace_rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            if states[0] is not None:
                states[0] = pick(states[0])

    def move(self, into: Mapping[str, torch.Tensor]) -> None:
        """Go on in these tensors, shaped as those of `held`, which become this layer's own."""
        for name, state in self.held().items():
            into[name].copy_(state)
        self.conv_states[0], self.recurrent_states[0] = into.get(_CONV), into.get(_RECURRENT)

    def held(self) -> dict[str, torch.Tensor]:
        """The existing states themselves, by name."""
        found = {_CONV: self.conv_states[0], _RECURRENT: self.recurrent_states[0]}
        return {name: state for name, state in found.items() if state is not None}
