"""What a model will take in memory, before any of its weights are read.

The headers of its safetensors files say how many numbers there are, its configuration how much a
token takes in the cache. Both are small, so a model that cannot fit is refused in a second, not
after minutes of loading. What is not said stays unknown.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from amcli.errors import OutOfMemoryError
from amcli.models.geometry import LayerGeometry
from amcli.models.state import EMPTY, STATEFUL
from amcli.system.units import bytes_text

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# By safetensors' names. Types not listed are packed: they stay as they are.
_FLOATS = ("F64", "F32", "F16", "BF16")
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16}

# Control groups, version 2 and version 1: folder, limit, use, and the file cache within it.
_GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)

_SPARE = 0.9
"""Share of free memory that a document may fill, for the line that says how long it may be."""


@dataclass(frozen=True)
class Need:
    """The memory a model takes, as far as known.

    parameters   numbers in its weights; None when no header says
    weights      bytes of the weights as they will be loaded
    per_token    bytes that a token adds to the full cache; None when the configuration is unusual
    free         bytes free on the device before loading; None when unknown
    """

    parameters: int | None
    weights: int | None
    per_token: int | None
    free: int | None

    @property
    def longest(self) -> int | None:
        """Roughly, tokens of the longest document whose full cache fits beside the weights."""
        if self.free is None or self.weights is None or not self.per_token:
            return None
        return max(0, int((self.free - self.weights) * _SPARE / self.per_token))


@dataclass(frozen=True)
class Preview:
    """A model before its weights are read: what it is, where it will be, how much it will take.

    devices     where its layers will be, one or several
    made_for    positions it was trained for, in tokens; None when not said
    notes       further lines that a user should read
    layers      its attention layers by the configuration; None when that is unusual
    queries     numbers in all query heads of a layer together
    has_states  whether some layers keep a state in place of keys and values
    """

    id: str
    devices: Sequence[torch.device]
    dtype: torch.dtype
    need: Need
    made_for: int | None
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...] = ()
    layers: tuple[LayerGeometry, ...] | None = None
    queries: int = 0
    has_states: bool = False

    def line(self) -> str:
        """A line for people: `Qwen/Qwen3-4B in bfloat16 on cuda: 8.04 GB of 84.2 GB free; …`."""
        line = f"{self.id} in {dtype_name(self.dtype)} on {self._place}"
        if self.need.weights is not None:
            free = "" if self.need.free is None else f" of {bytes_text(self.need.free)} free"
            line += f": {bytes_text(self.need.weights)}{free}"
        longest = self.need.longest
        if longest is None or (self.made_for is not None and self.made_for <= longest):
            return line + (f"; made for {self.made_for:,} tokens" if self.made_for else "")
        return f"{line}; documents of up to {_rounded(longest):,} tokens fit"

    def require_weights(self) -> None:
        """Raises OutOfMemoryError when the weights alone exceed what is free."""
        need = self.need
        if need.weights is None or need.free is None or need.weights <= need.free:
            return
        smaller = "dtype='bfloat16', " if self.dtype == torch.float32 else ""
        other = "a machine with more memory" if self._place == "cpu" else "device='cpu'"
        raise OutOfMemoryError(
            f"{self.id} needs {bytes_text(need.weights)} for its weights in "
            f"{dtype_name(self.dtype)}, and {self._place} has {bytes_text(need.free)} free",
            f"try {smaller}a smaller model, or {other}",
            code="model-too-large",
            field="model",
            model=self.id,
            dtype=dtype_name(self.dtype),
            device=self._place,
            weights=need.weights,
            free=need.free,
        )

    def require_document(self, name: str, text: str) -> None:
        """Raises OutOfMemoryError when the full cache of a document cannot fit beside them."""
        need, longest = self.need, self.need.longest
        if longest is None or len(text.encode()) <= longest:  # no token is less than a byte
            return
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        weights, cache, free = need.weights or 0, tokens * (need.per_token or 0), need.free or 0
        if weights + cache <= free:
            return
        raise OutOfMemoryError(
            f"{name} has {tokens:,} tokens, whose cache takes {bytes_text(cache)} beside "
            f"{bytes_text(weights)} of weights, and {self._place} has {bytes_text(free)} free",
            f"shorten the document to about {longest:,} tokens, or choose a smaller model",
            code="cache-too-large",
            field="source",
            tokens=tokens,
            longest=longest,
        )

    @property
    def _place(self) -> str:
        return str(self.devices[0]) if len(self.devices) == 1 else f"{len(self.devices)} GPUs"


def estimate(
    location: str,
    revision: str | None,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    processes: int = 1,
    numbers: int | None = None,
) -> Need:
    """What a process needs for the model at a folder or hub id, in `dtype`. Never raises.

    Weights and cache are divided among `processes`, as is a CPU's memory, and spread over the
    `devices` of this process. `numbers` is the count of the weights, all loaded in `dtype`, if
    that is known and need not be looked up.
    """
    counts = _counts(location, revision) if numbers is None else {_FLOATS[0]: numbers}
    parameters = None if counts is None else sum(counts.values())
    weights = None if counts is None else _bytes(counts, dtype) // processes
    per_token = cache_bytes(config, dtype)
    known = [n for n in map(free_bytes, devices) if n is not None]
    free = sum(known) if len(known) == len(devices) else None
    if free is not None and devices[0].type == "cpu":
        free //= processes
    return Need(parameters, weights, None if per_token is None else per_token // processes, free)


def cache_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int | None:
    """Bytes that each token adds to the full cache; None when the configuration is unusual.

    Layers with a window or a state do not grow with the document and count for nothing.
    """
    layers = layers_of(config)
    if layers is None:
        return None
    full = [layer for layer in layers if layer.window is None]
    numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in full)
    return numbers * dtype.itemsize


def layers_of(config: PreTrainedConfig) -> tuple[LayerGeometry, ...] | None:
    """The attention layers by the configuration; None when it is unusual.

    What a model really does is found once its weights are loaded; see `probe`.
    """
    fields = vars(config.get_text_config(decoder=True))  # not getattr: layers may differ in a field
    layers, width, query_heads = (
        _count(fields.get(name))
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if not layers or not width or not query_heads:
        return None
    heads = _count(fields.get("num_key_value_heads")) or query_heads
    dim = _count(fields.get("head_dim")) or width // query_heads
    full = LayerGeometry("full", heads, dim, dim)
    kinds = fields.get("layer_types")
    if kinds is None:
        return (full,) * layers
    kept = [kind for kind in kinds if kind not in STATEFUL | EMPTY]
    window = _count(fields.get("sliding_window")) or 1
    tail = LayerGeometry("sliding", heads, dim, dim, window)
    return tuple(tail if kind == "sliding_attention" else full for kind in kept)


def has_states(config: PreTrainedConfig) -> bool:
    """Whether some layers keep a state in place of keys and values, by the configuration."""
    kinds = vars(config.get_text_config(decoder=True)).get("layer_types")
    return not STATEFUL.isdisjoint(kinds or ())


def query_width(config: PreTrainedConfig) -> int:
    """Numbers in a layer's query heads together, by the configuration; 0 when it is unusual."""
    fields = vars(config.get_text_config(decoder=True))
    heads, width = (_count(fields.get(x)) for x in ("num_attention_heads", "hidden_size"))
    return heads * _count(fields.get("head_dim")) or width


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def free_bytes(device: torch.device) -> int | None:
    """Bytes free on a device; None where the system does not say."""
    if device.type == "cuda":
        try:
            return int(torch.cuda.mem_get_info(device)[0])
        except RuntimeError:
            return None
    if device.type != "cpu":
        return None
    known = [n for n in (_available(), _left_in_group()) if n is not None]
    return min(known, default=None)


# ---- numbers of the weights -------------------------------------------------------------------


def _counts(location: str, revision: str | None) -> Mapping[str, int] | None:
    """Count of numbers by safetensors dtype; None where there are no headers to read."""
    folder = Path(location)
    try:
        if folder.is_dir():
            return _of_files(_listed(folder))
        cached = _cached(location, revision)
        if cached is not None:
            return _of_files(cached)
        found = get_safetensors_metadata(location, revision=revision)
        return {str(kind): n for kind, n in found.parameter_count.items()}
    except Exception:  # loading the model reports what is wrong here better
        return None


def _listed(folder: Path) -> list[Path]:
    """The weight files that transformers would read."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    weights = json.loads((folder / _INDEX).read_bytes())["weight_map"]
    return [folder / name for name in sorted(set(weights.values()))]


def _cached(name: str, revision: str | None) -> list[Path] | None:
    """The same for a hub model already downloaded; None when a file is missing."""
    for file in (_SINGLE, _INDEX):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            files = _listed(Path(found).parent)
            return files if all(path.is_file() for path in files) else None
    return None


def _of_files(paths: Iterable[Path]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_slice(name)
                size = 1
                for n in tensor.get_shape():
                    size *= n
                counts[tensor.get_dtype()] = counts.get(tensor.get_dtype(), 0) + size
    return counts


def _bytes(counts: Mapping[str, int], dtype: torch.dtype) -> int:
    """Bytes once loaded: floats are loaded in `dtype`, packed numbers stay as they are."""
    return sum(
        n * (dtype.itemsize * 8 if kind in _FLOATS else _BITS.get(kind, 8)) // 8
        for kind, n in counts.items()
    )


# ---- memory of this machine -------------------------------------------------------------------


def _available() -> int | None:
    """What Linux can give without swapping; on other systems all of the machine's memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _left_in_group() -> int | None:
    """What a container's limit leaves; None without one. File caches count as free."""
    for folder, limit, used, cached in _GROUPS:
        group = Path("/sys/fs/cgroup") / folder
        try:
            most = int((group / limit).read_text())
            held = int((group / used).read_text())
            lines = map(str.split, (group / "memory.stat").read_text().splitlines())
            back = sum(int(count) for name, count in lines if name == cached)
        except (OSError, ValueError):  # no such group, or "max"
            continue
        return max(0, most - held + back)
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in manifests, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _rounded(tokens: int) -> int:
    """Rounded down to two digits: it is an estimate."""
    step = int(10 ** max(0, len(str(tokens)) - 2))
    return tokens // step * step
