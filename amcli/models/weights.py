"""Numbers out of a model's weights, which tell it from its fine-tunes.

A hash would change with the dtype that the weights are loaded in. Sampled numbers do not change by
more than rounding, so they are kept as they are, and compared within that. Every tensor has some,
at places that depend on its name and shape alone: not on dtype, device, shards or where the
weights come from. Packed weights (integers, whatever a quantizer makes) and those that are not in
memory are left out. Only the sampled numbers are read, so that this takes milliseconds.
`amkv_format.weights` compares them.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Sharded
from transformers import PreTrainedModel

from amcli.models.sharding import Shard

_NUMBERS = 64
"""Numbers that a group of tensors gives at least; every tensor gives one or more, and as far as
there is room, so does every expert."""

_TENSORS = 256
"""Tensors of a group that are looked at, spread evenly, such as experts that are not joined."""

_MOST = 1024
"""Numbers that a group may give at most, as the format has it."""

_UNKNOWN = math.nan
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NAME_CHARS = 256


def sample(model: PreTrainedModel, shard: Shard | None = None) -> dict[str, str]:
    """Numbers of each group of tensors, as 8 hexadecimal digits each (binary32).

    A group is the tensors of one name, but for numbers in it, and of one shape:
    `model.layers.*.mlp.up_proj.weight 9728x2560`. With a `shard` of several, every process has to
    call this, and gets the same.
    """
    groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in _tensors(model):
        group = f"{re.sub(r'[0-9]+', '*', name)} {'x'.join(map(str, tensor.shape))}"
        if tensor.numel() and len(group) <= _NAME_CHARS:
            groups.setdefault(group, []).append((name, tensor))
    places: dict[str, int] = {}
    numbers: list[torch.Tensor | None] = []
    for group, tensors in groups.items():
        found = list(_of_group(tensors))
        places[group] = len(found)
        numbers += found
    values = _gathered(_read(numbers), shard or Shard())
    result, start = {}, 0
    for group, count in places.items():
        part = values[start : start + count]
        start += count
        if not all(map(math.isnan, part)):
            result[group] = "".join(struct.pack(">f", value).hex() for value in part)
    return result


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, tied ones once, and the buffers that are saved with them."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        for name, buffer in module.named_buffers(path, recurse=False):
            if buffer.is_floating_point() and name.rpartition(".")[2] not in passing:
                yield name, buffer


def _of_group(tensors: list[tuple[str, torch.Tensor]]) -> Iterator[torch.Tensor | None]:
    """The sampled numbers, as views; None where they cannot be read here."""
    ordered = sorted(tensors, key=lambda item: [int(x) for x in re.findall("[0-9]+", item[0])])
    count = min(len(ordered), _TENSORS)
    shape = ordered[0][1].shape
    # Joined tensors, such as the experts of a layer, count as the tensors that they are made of.
    joined = shape[0] if len(shape) > 2 else 1
    each = max(-(-_NUMBERS // count), min(joined, _MOST // count))
    for i in range(count):
        name, tensor = ordered[i * len(ordered) // count]
        part = tensor.numel() // joined
        for j in range(each):
            digest = hashlib.sha256(f"{name}:{j}".encode()).digest()
            place = int.from_bytes(digest[:8], "big") % part
            yield _number(tensor.detach(), (i * each + j) % joined * part + place)


def _number(tensor: torch.Tensor, place: int) -> torch.Tensor | None:
    """The number at a place of the flat tensor, or of what this process has of it."""
    index: list[int] = []
    for size in reversed(tensor.shape):
        place, at = divmod(place, size)
        index.insert(0, at)
    if isinstance(tensor, DTensor):
        if tensor.device_mesh.ndim != 1:
            return None
        (placement,) = tensor.placements
        if type(placement) is Sharded:
            per = -(-tensor.shape[placement.dim] // tensor.device_mesh.size())
            index[placement.dim] -= per * tensor.device_mesh.get_local_rank()
            if not 0 <= index[placement.dim] < per:
                return None
        elif type(placement) is not Replicate:
            return None
        tensor = tensor.to_local()
    if tensor.dtype not in _FLOATS or tensor.is_meta:
        return None
    return tensor[tuple(index)]


def _read(numbers: list[torch.Tensor | None]) -> list[float]:
    """All numbers, in one go for each device and dtype."""
    values = [_UNKNOWN] * len(numbers)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, number in enumerate(numbers):
        if number is not None:
            alike.setdefault((number.device, number.dtype), []).append(i)
    for places in alike.values():
        read = torch.stack([x for i in places if (x := numbers[i]) is not None])
        for i, value in zip(places, read.float().tolist(), strict=True):
            values[i] = value if math.isfinite(value) else _UNKNOWN
    return values


def _gathered(values: list[float], shard: Shard) -> list[float]:
    """The values of all processes: of each, what one of them has."""
    everywhere = shard.everywhere(values)
    known = ([x for x in each if not math.isnan(x)] for each in zip(*everywhere, strict=True))
    return [each[0] if each else _UNKNOWN for each in known]
