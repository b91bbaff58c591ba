"""Token after token over a cache: a decode step that Python describes once and the device repeats.

From Python a step is a thousand launches, which take longer than the work they start. So the first
step runs over buffers with room to spare, the second is captured as a graph, and every later one is
a single launch; a longer text takes larger buffers and another capture. Where that cannot be, each
step is a call of the model, as it always was.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from transformers import PreTrainedModel

from amcli.errors import AmkvError, AmkvWarning, OutOfMemoryError
from amcli.models.attention import unpadded
from amcli.models.cache import CompactCache
from amcli.models.calling import accepts, run
from amcli.models.failures import out_of_memory
from amcli.models.geometry import decoder_of
from amcli.models.graphs import GRAPHS, Graph
from amcli.models.lengths import changes_with_length
from amcli.models.quick import quick
from amcli.system.processes import launched

ROOM = 256
"""Columns of the smallest buffers, and by how much buffers grow at least."""

WORTH = 8
"""Steps for which a capture, which takes about as long as two of them, pays."""


_SWITCHES = (bool, int, float, str, list, tuple)

_can: WeakKeyDictionary[PreTrainedModel, dict[frozenset[str], bool]] = WeakKeyDictionary()
"""Whether steps of a model can be captured, where that is known, for caches with some stores."""

_said: WeakSet[PreTrainedModel] = WeakSet()


class Step:
    """A decode step over the buffers that a cache has now, which it makes larger.

    rows   sequences; each is fed one token
    left   steps for which there is room
    free   whether the cache that had the buffers is gone, so that another may `take` them

    Tokens and counters are on the device: the logical length, and the columns of the next tokens.
    Keys and values right of those columns count for nothing, so a step that is not counted in the
    cache might as well not have run.
    """

    def __init__(self, cache: CompactCache, rows: int, tokens: int) -> None:
        layers = cache.attention
        room = min(tokens, max(ROOM, *(layer.end for layer in layers)))
        for layer in layers:
            layer.hold(capacity(layer.live()[0].shape[2] + room))
        self._buffers = [layer.buffers for layer in layers]
        self._prefixes = [layer.prefix for layer in layers]
        self.states = _held(cache)
        self._before = [torch.empty_like(state) for state in self.states]
        self.saved = False
        ends = sorted({layer.end for layer in layers})
        self._groups = [ends.index(layer.end) for layer in layers]
        device = self._buffers[0][0].device
        self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._counters = torch.zeros(1 + len(ends), dtype=torch.int64, device=device)
        self._inference = torch.is_inference_mode_enabled()
        self._model: tuple[int, ...] = ()
        self.graph: Graph | None = None
        self._ran = 0
        self.left = 0
        self.free = False

    def fits(self, cache: CompactCache, rows: int) -> bool:
        """Whether the cache still has these buffers, and room in them."""
        layers = cache.attention
        return (
            self._is_of(cache, rows, [layer.end for layer in layers])
            and self.holds(cache)
            and self._same_states(cache)
            and all(layer.end < layer.capacity for layer in layers)
        )

    def take(self, cache: CompactCache, rows: int, tokens: int) -> bool:
        """Let another cache of the same context go on in these buffers, if no one else does and
        there is room for so many tokens; the graph stays."""
        kept = [layer.live()[0].shape[2] for layer in cache.attention]
        room = min(keys.shape[2] - n for (keys, _), n in zip(self._buffers, kept, strict=True))
        shapes = [[x.shape for x in states] for states in (_held(cache), self.states)]
        if (
            not self.free
            or not self._is_of(cache, rows, kept)
            or room < min(tokens, ROOM)
            or shapes[0] != shapes[1]
        ):
            return False
        self.free = False
        for layer, buffers in zip(cache.attention, self._buffers, strict=True):
            layer.move(*buffers)
        rest = iter(self.states)
        for state in cache.states:
            state.move({name: next(rest) for name in state.held()})
        return True

    def holds(self, cache: CompactCache) -> bool:
        """Whether the cache has these buffers to itself."""
        return all(map(lambda x, own: x.holds(own[0]), cache.attention, self._buffers))

    def _is_of(self, cache: CompactCache, rows: int, ends: list[int]) -> bool:
        """Whether what was captured is right for a cache with columns in use up to `ends`."""
        prefixes = [layer.prefix for layer in cache.attention]
        return (
            self._ids.shape[0] == rows
            and self._inference == torch.is_inference_mode_enabled()
            and all(map(lambda a, b: a is b, prefixes, self._prefixes))
            and len({*zip(self._groups, ends, strict=True)}) == self._counters.numel() - 1
        )

    def _same_states(self, cache: CompactCache) -> bool:
        held = _held(cache)
        return len(held) == len(self.states) and all(map(lambda a, b: a is b, held, self.states))

    def is_of(self, model: PreTrainedModel) -> bool:
        """Whether what was captured, if anything was, is what the model still does."""
        return self.graph is None or self._model == _parts(model)

    def align(self, cache: CompactCache) -> None:
        """Go on from where the cache is."""
        ends = dict(zip(self._groups, (layer.end for layer in cache.attention), strict=True))
        counters = [cache.get_seq_length(), *(ends[group] for group in range(len(ends)))]
        self._counters.copy_(torch.tensor(counters))
        self.left = min(layer.capacity - layer.end for layer in cache.attention)
        self.saved = False

    def launch(self, model: PreTrainedModel, cache: CompactCache, ids: torch.Tensor) -> Any:
        """Feed `ids [rows, 1]`, not counting them in the cache yet; logits `[rows, V]`, which are
        overwritten by the next step."""
        self._ids.copy_(ids)
        if self.states:
            torch._foreach_copy_(self._before, self.states)
            self.saved = True
        self._ran += 1
        if self.graph is None and self._ran > 1:
            known, stores = _can.setdefault(model, {}), _stores(cache)
            kind = GRAPHS[self._ids.device.type]
            if stores not in known:
                # Once, because a capture that fails may leave more behind than an error does.
                with kind.strictly():
                    found = self._call(model, cache)
                known[stores] = True
                return found
            self._model = _parts(model)
            self.graph = kind(partial(self._call, model, cache), self._ids.device)
        if self.graph is not None:
            self.graph.replay()
            return self.graph.out
        found = self._call(model, cache)
        if not self._same_states(cache):
            raise RuntimeError("it replaces its states instead of changing them")
        return found

    def keep(self, cache: CompactCache) -> None:
        """Count the tokens of the last launch in the cache."""
        for layer in cache.attention:
            layer.advance(1)
        self.left -= 1

    def take_back(self) -> None:
        """Undo what a launch that is not counted may have done to states."""
        if self.saved:
            torch._foreach_copy_(self.states, self._before)

    def _call(self, model: PreTrainedModel, cache: CompactCache) -> torch.Tensor:
        for layer, group in zip(cache.attention, self._groups, strict=True):
            layer.at = self._counters[1 + group : 2 + group]
        try:
            with unpadded(), quick(model):
                place = self._counters[:1].view(1, 1)
                found = run(model, cache, self._ids, position_ids=place, logits_to_keep=1)
            cache.require_attended()
        finally:
            for layer in cache.attention:
                layer.at = None
        self._counters.add_(1)
        logits: torch.Tensor = found.logits[:, -1]
        return logits


def _held(cache: CompactCache) -> list[torch.Tensor]:
    return [tensor for state in cache.states for tensor in state.held().values()]


def _parts(model: PreTrainedModel) -> tuple[int, ...]:
    """What a graph of a model relies on: where its numbers are, which modules and hooks run, and
    their switches. An adapter that is loaded or switched, or a hook, changes that."""
    modules = [*model.modules()]
    hooks = sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in modules)
    switches = [
        (type(x), *(str(value) for value in vars(x).values() if isinstance(value, _SWITCHES)))
        for x in modules
    ]
    numbers = (x.data_ptr() for x in (*model.parameters(), *model.buffers()))
    return (hooks, hash(tuple(switches)), *numbers)


def _stores(cache: CompactCache) -> frozenset[str]:
    """The stores of a cache's prefixes."""
    prefixes = (layer.prefix for layer in cache.attention)
    return frozenset(prefix.entries.store for prefix in prefixes if prefix is not None)


def capacity(tokens: int) -> int:
    """Columns of buffers for that many tokens: a half more than the last size, or less."""
    step = max(ROOM, 1 << max(0, (tokens - 1).bit_length() - 2))
    return -(-tokens // step) * step


class Decoder:
    """Feeds a cache one token after another, at most `tokens` of them.

    A step that fails or is interrupted leaves the cache as it was before it.
    """

    def __init__(self, model: PreTrainedModel, cache: CompactCache, tokens: int) -> None:
        self.model, self.cache, self.tokens = model, cache, tokens
        self._step: Step | None = None  # if the device's counters are those of the cache
        self._captures = True

    @torch.no_grad()
    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Append `ids [rows, 1]`; logits `[rows, V]`, to be used before the next call."""
        logits = self._captured(ids)
        if logits is None:
            logits = forward(self.model, self.cache, ids, logits_to_keep=1).logits[:, -1]
        self.tokens -= 1
        return logits

    @torch.no_grad()
    def ahead(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Let the device begin with what `feed` would do, to be counted by `keep`; or not, if
        anything else is done instead. None where it cannot begin before that is known."""
        step = self._step
        if step is None or step.graph is None or step.states or not self._room(step):
            return None
        self._step = None
        logits: torch.Tensor = step.launch(self.model, self.cache, ids)
        return logits

    def keep(self) -> None:
        """Count what was begun."""
        step, length = self.cache.step, self.cache.get_seq_length()
        try:
            step.keep(self.cache)
        except BaseException:
            self.cache.rewind_attention(length)
            raise
        self._step = step
        self.tokens -= 1

    def let_go(self) -> list[Step]:
        """The step, if it can serve another fork of the same context as the `step` of that; this
        cache must not be used any more."""
        step, self.cache.step, self._step = self.cache.step, None, None
        if step is None or step.graph is None or not step.holds(self.cache):
            return []
        step.free = True
        return [step]

    def _captured(self, ids: torch.Tensor) -> torch.Tensor | None:
        """`feed` by way of a step that is captured; None where there is none."""
        length = self.cache.get_seq_length()
        step = None
        try:
            step = self._ready(ids)
            if step is None:
                return None
            step.saved = False
            self._step = None
            logits: torch.Tensor = step.launch(self.model, self.cache, ids)
            step.keep(self.cache)
            self._step = step
            return logits
        except BaseException as error:
            self.cache.step = None
            self.cache.rewind_attention(length)
            if step is not None:
                step.take_back()
            known = isinstance(error, AmkvError) or not isinstance(error, Exception)
            if known or (step is not None and step.graph is not None):
                raise
            self._captures = False
            self._say(str(error).splitlines()[0] if str(error) else type(error).__name__)
            if not out_of_memory(error):
                _can.setdefault(self.model, {})[_stores(self.cache)] = False
            return None

    def _ready(self, ids: torch.Tensor) -> Step | None:
        """The step to run, made if need be."""
        step = self._step
        if step is not None and self._room(step):
            return step
        self._step = None
        if not self._suits(ids):
            return None
        step, asked = self.cache.step, (self.cache, len(ids))
        if step is not None and not step.is_of(self.model):
            step = None
        if step is None or not (step.fits(*asked) or step.take(*asked, self.tokens)):
            if self.tokens < WORTH:
                return None
            step = self.cache.step = None  # first, for its memory
            step = self.cache.step = Step(*asked, self.tokens)
        step.align(self.cache)
        return step if self._room(step) else None

    def _room(self, step: Step) -> bool:
        """Whether a step has room, in its buffers and in what the model was made for."""
        length = self.cache.get_seq_length()
        seen = (layer.horizon for layer in self.cache.attention)
        return step.left > 0 and all(horizon is None or length < horizon for horizon in seen)

    def _suits(self, ids: torch.Tensor) -> bool:
        """Whether steps can be captured here; says why not."""
        cache, model = self.cache, self.model
        if ids.device.type not in GRAPHS or not self._captures or cache.observed:
            return False
        known = _can.setdefault(model, {})
        kept = [*(layer.buffers[0] for layer in cache.attention), *_held(cache)]
        if not known.get(_stores(cache), True) or {len(x) for x in kept} != {len(ids)}:
            return False
        reason = None
        if len({x.device for x in [*kept, ids]}) > 1 or launched() > 1:
            reason = "the model is spread over several devices"
        elif changes_with_length(model):
            reason = "the frequencies of its RoPE depend on the length"
        elif not accepts(decoder_of(model), "position_ids"):
            reason = "the model does not take positions"
        if reason is not None:
            self._say(reason)
            known[_stores(cache)] = False
        return reason is None

    def _say(self, reason: str) -> None:
        if self.model in _said:
            return
        _said.add(self.model)
        warnings.warn(
            f"decoding cannot be captured as a graph here, so it takes longer: {reason}",
            AmkvWarning,
            stacklevel=2,
        )


def forward(module: torch.nn.Module, cache: CompactCache, ids: torch.Tensor, **options: Any) -> Any:
    """One forward pass over `ids [B, m]` that leaves the cache as it was if it fails."""
    mark = cache.mark()
    try:
        output = run(module, cache, ids, **options)
        cache.require_attended()
    except BaseException as error:
        cache.rewind(mark)
        if out_of_memory(error):
            raise OutOfMemoryError(
                f"out of memory on {ids.device} at token {mark.length + ids.shape[1]}",
                "try a shorter document, dtype='bfloat16', or device='cpu'",
                code="out-of-memory",
                device=ids.device,
            ) from error
        raise
    return output
