"""A budget as a file: how the entries of one document were shared out, for use with the next.

A small JSON file with the share of the entries that each head of each compacted layer got. It
also says what made it, for people; only the shares and the layers they belong to are read. For
another document or ratio, the shares are scaled to the entries available.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amcli.errors import ModelMismatchError, UsageError
from amcli.matching.budgets import FLOOR_LEAST, LayerShape, Lengths
from amcli.system.files import write_json

FORMAT = "amkv-budget"
VERSION = 1

_LARGEST = 1 << 26  # bytes; a thousand layers of a thousand heads need less
_AGAIN = "make one with budget_file.write"
_LEAST_SHARE = 1e-9  # a head whose share was zero is filled last, not never


@dataclass(frozen=True)
class BudgetFile:
    """What a budget file says.

    layers   index of each compacted layer in the model
    shares   per layer and head; they sum to 1
    model    identity of the model it was made with, as far as the file gives it
    sha256   hash of the file
    """

    path: Path
    layers: list[int]
    shares: list[list[float]]
    model: dict[str, Any]
    sha256: str

    @classmethod
    def read(cls, path: Path) -> BudgetFile:
        """Reads and checks a file; raises UsageError when it is not one or has another version."""
        data = _bytes(path)
        try:
            record = json.loads(data)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise UsageError(
                f"{path} is not a budget file",
                _AGAIN,
                code="not-a-budget",
                field="budget",
                path=path,
            )
        if record.get("version") != VERSION:
            raise UsageError(
                f"{path} is a budget file of version {record.get('version')!r}; "
                f"this amkv reads version {VERSION}",
                "update amkv, or save the budget again",
                code="budget-version",
                field="budget",
                path=path,
                version=record.get("version"),
            )
        layers = record.get("layers")
        if not isinstance(layers, list) or not all(map(_is_layer, layers)):
            raise UsageError(
                f"{path} is a broken budget file: its shares are not numbers from 0 to 1",
                _AGAIN,
                code="budget-broken",
                field="budget",
                path=path,
            )
        indices = [layer["layer"] for layer in layers]
        if twice := [i for i in indices if indices.count(i) > 1]:
            raise UsageError(
                f"{path} is a broken budget file: layer {twice[0]} twice",
                _AGAIN,
                code="budget-broken",
                field="budget",
                path=path,
            )
        total = math.fsum(s for layer in layers for s in layer["shares"])
        if not total > 0:
            raise UsageError(
                f"{path} is a broken budget file: its shares are all zero",
                _AGAIN,
                code="budget-broken",
                field="budget",
                path=path,
            )
        model = record.get("model")
        return cls(
            path,
            indices,
            [[s / total for s in layer["shares"]] for layer in layers],
            model if isinstance(model, dict) else {},
            hashlib.sha256(data).hexdigest(),
        )

    def require_fit(self, model: str, layers: Sequence[int], shapes: Sequence[LayerShape]) -> None:
        """Raises ModelMismatchError unless the file is for these compacted layers and heads."""
        there = dict(zip(self.layers, map(len, self.shares), strict=True))
        here = {layer: shape.heads for layer, shape in zip(layers, shapes, strict=True)}
        if there == here:
            return
        raise ModelMismatchError(
            f"budget {self.path} does not fit {model}: the file has {_counted(there)}, "
            f"the model {_counted(here)} to compact",
            "write one with this model",
            code="budget-of-another-model",
            field="budget",
            path=self.path,
            model=model,
        )

    def made_elsewhere(self, model: Mapping[str, Any]) -> bool:
        """Whether the file says it was made with a model other than the manifest's."""
        return bool(self.model.get("config_hash") != model["config_hash"])

    def allocate(self, total: int, layers: Sequence[LayerShape]) -> Lengths:
        """Shares out `total` entries in these proportions; see `scaled`."""
        return scaled(self.shares, total, layers)


def scaled(shares: Sequence[Sequence[float]], total: int, layers: Sequence[LayerShape]) -> Lengths:
    """Whole numbers of entries in proportion to `shares[layer][head]`; they sum to `total`.

    Every head gets at least FLOOR_LEAST entries (fewer when `total` is too small for that) and at
    most its `T`; what a full head cannot take goes to the others, in proportion. Rounding follows
    Webster's method, so a larger total takes no entry from any head (once there are enough for
    the floors). Raises ValueError when `total` is negative or larger than the number of tokens.
    """
    flat = [max(share, _LEAST_SHARE) for heads in shares for share in heads]
    top = [layer.tokens for layer in layers for _ in range(layer.heads)]
    if not 0 <= total <= sum(top):
        raise ValueError(f"a budget of {total} entries for {sum(top)} keys")
    floor = min(FLOOR_LEAST, total // max(1, len(flat)))

    def at(scale: float) -> list[int]:
        wanted = (math.floor(scale * share + 0.5) for share in flat)
        return [max(min(floor, t), min(t, w)) for w, t in zip(wanted, top, strict=True)]

    low, high = 0.0, (max(top, default=0) + 1) / _LEAST_SHARE
    for _ in range(200):  # find the largest scale that does not give too many
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if sum(at(middle)) <= total else (low, middle)
    lengths = at(low)
    more = at(high)  # heads that tie for what is left; earlier ones come first
    for i in range(len(lengths)):
        step = min(more[i] - lengths[i], total - sum(lengths))
        lengths[i] += max(0, step)
    rest = iter(lengths)
    return [[next(rest) for _ in range(layer.heads)] for layer in layers]


def write(
    path: Path, lengths: dict[int, list[int]], about: dict[str, Any], *, overwrite: bool
) -> None:
    """Writes `lengths`, entries of each head by layer index, as a budget file: whole or not at all.

    `about` says where they come from. Raises UsageError when the file exists (unless
    `overwrite`) or its folder does not, and whatever else `output_errors` raises.
    """
    total = max(1, sum(map(sum, lengths.values())))
    layers = [
        {"layer": i, "shares": [round(t / total, 12) for t in heads], "entries": heads}
        for i, heads in lengths.items()
    ]
    record = {"format": FORMAT, "version": VERSION, **about, "layers": layers}
    write_json(path, record, overwrite)


def _bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise UsageError(
                f"budget {path} is not a file",
                "check the path",
                code="budget-unreadable",
                field="budget",
                path=path,
            )
        if path.stat().st_size > _LARGEST:
            raise UsageError(
                f"{path} is not a budget file",
                _AGAIN,
                code="not-a-budget",
                field="budget",
                path=path,
            )
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}",
            "check the path",
            code="budget-unreadable",
            field="budget",
            path=path,
        ) from error


def _is_layer(layer: object) -> bool:
    if not isinstance(layer, dict) or type(layer.get("layer")) is not int:
        return False
    shares = layer.get("shares")
    return isinstance(shares, list) and all(
        type(share) in (int, float) and 0 <= share <= 1 for share in shares
    )


def _counted(heads: dict[int, int]) -> str:
    """`9 layers of 2 KV heads`, naming the layers where they are not simply the first ones."""
    counts = sorted(set(heads.values()))
    each = " or ".join(f"{n}" for n in counts)
    some = "" if list(heads) == list(range(len(heads))) else f" ({_indices(list(heads))})"
    return f"{len(heads)} layers{some} of {each} KV heads"


def _indices(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:6]))
    return shown if len(layers) <= 6 else f"{shown}, …"
