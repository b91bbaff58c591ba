"""Compact layers: share their heads out into buckets, and put what comes of them together again.

Heads differ in length by an order of magnitude, so they are worked in buckets of similar length:
padding stays below half. A bucket takes heads of any layer, as many as there is room for: a GPU
wants few large steps, not many small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from amcli.entries.ragged import Entries

from .bucket import (
    FIT_LIMIT,
    Bucket,
    Head,
    Settings,
    compact_bucket,
    empty,
    round_whole,
    whole,
)
from .known import Known
from .methods import Method, Rounding
from .scores import Stats
from .selection import PURSUIT, screened
from .tiles import Room, room_on

_SPREAD = 1.5  # longest over shortest head of a bucket


@dataclass(frozen=True)
class LayerInput:
    """One layer to compact: to `lengths[h]` entries a head.

    Q `[H, n, d]` reference queries, weights `[H, n]` their W (None: 1), K `[H, T, d]` and
    V `[H, T, dv]` the document, scores `[H, T]` from `ScoreState` or the method's `score`;
    scale and softcap of the logits. known: what earlier calls with the same queries, keys and
    values have found, and this one adds to.
    """

    Q: torch.Tensor
    K: torch.Tensor
    V: torch.Tensor
    scores: torch.Tensor
    lengths: Sequence[int]
    scale: float
    softcap: float | None = None
    weights: torch.Tensor | None = None
    known: Known = field(default_factory=Known)

    @property
    def alike(self) -> tuple[object, ...]:
        """Heads of two layers may share a bucket where these are equal."""
        weighted = self.weights is not None
        shapes = (self.Q.shape[1:], self.K.shape[1:], self.V.shape[1:])
        kept = self.known.kept
        return (*shapes, self.K.dtype, self.K.device, self.scale, self.softcap, weighted, kept)


@dataclass(frozen=True)
class LayerResult:
    """One compacted layer.

    heads         the entries, in order of position within each head
    index         `[N]` int32, position in the document of each entry, in the same order
    mass_error, output_error  `[H]`, see `errors.FitErrors`; 1 for an empty head

    Errors are over the reference queries, of the entries as stored; nan with no queries.
    """

    heads: Entries
    index: torch.Tensor
    mass_error: torch.Tensor
    output_error: torch.Tensor


Place = tuple[int, int]
"""A layer, by its place among those given, and a head of it."""


def compact_layers(
    method: Method,
    layers: Sequence[LayerInput],
    *,
    seed: int = 0,
    rounding: Rounding | None = None,
    room: Room | None = None,
    fit_limit: int = FIT_LIMIT,
    advance: Callable[[int], None] = lambda heads: None,
) -> Iterator[tuple[int, LayerResult]]:
    """Compact layers, each to its own lengths; yields each by its place among those given, as soon
    as its heads are finished.

    A head whose length is `T` keeps its own keys and values with beta 0, one with 0 gets no entry.
    Keys and values come back in the dtypes of `K` and `V`, beta in float32 (None for a method
    without one). `room` bounds the memory that is taken beside the inputs and results. `advance`
    is called with the number of heads that have been finished since.

    With `rounding` all keys and values come back rounded, in float32: keys are rounded as soon as
    they are selected, so that the fits make up for what that loses, values at the end.

    Raises ValueError when shapes, lengths and method do not fit each other.
    """
    for layer in layers:
        _check(method, layer)
    done: dict[Place, Head] = {}

    def finished(some: Iterable[int]) -> Iterator[tuple[int, LayerResult]]:
        for i in some:
            layer = layers[i]
            places = [(i, h) for h in range(layer.K.shape[0])]
            if all(place in done for place in places):
                heads = [done.pop(place) for place in places]
                yield i, _join(heads, layer.lengths, method.has_beta)

    for kind in dict.fromkeys(layer.alike for layer in layers):
        some = [i for i, layer in enumerate(layers) if layer.alike == kind]
        like = layers[some[0]]
        own = room_on(like.K.device) if room is None else room
        s = Settings(like.scale, like.softcap, seed, own.tile, fit_limit, rounding)
        truths = {i: _truth(layers[i], s) for i in some}
        for i in some:
            trivial = _trivial(layers[i], i, truths[i], s)
            done |= trivial
            advance(len(trivial))
            yield from finished([i])
        for places in _buckets(method, layers, some, own, fit_limit):
            found = compact_bucket(method, _gather(layers, places, truths), s)
            done |= dict(zip(places, found, strict=True))
            advance(len(places))
            yield from finished(sorted({i for i, _ in places}))


def compact_layer(
    method: Method,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    *,
    scores: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    softcap: float | None = None,
    weights: torch.Tensor | None = None,
    known: Known | None = None,
    seed: int = 0,
    rounding: Rounding | None = None,
    room: Room | None = None,
    fit_limit: int = FIT_LIMIT,
) -> LayerResult:
    """One layer alone; see `LayerInput` and `compact_layers`."""
    known = Known() if known is None else known
    layer = LayerInput(Q, K, V, scores, lengths, scale, softcap, weights, known)
    found = compact_layers(
        method, [layer], seed=seed, rounding=rounding, room=room, fit_limit=fit_limit
    )
    return next(found)[1]


def _truth(layer: LayerInput, s: Settings) -> Stats | None:
    """What the whole layer gives its queries, where it is known or kept for further calls."""
    if layer.known.waits:
        return None  # each bucket finds its own, a part at a time
    return layer.known.truth(layer.Q, layer.K, layer.V, layer.scale, layer.softcap, s.tile)


def _trivial(layer: LayerInput, i: int, truth: Stats | None, s: Settings) -> dict[Place, Head]:
    """The heads that keep all of their keys, or none."""
    H, T, _ = layer.K.shape
    full = [h for h in range(H) if layer.lengths[h] == T]
    done = {(i, h): whole(layer.K[h], layer.V[h]) for h in full}
    if s.rounding is not None and full:
        W = None if layer.weights is None else layer.weights[full]
        found = round_whole(
            s.rounding, layer.Q[full], layer.K[full], layer.V[full], s.scale, s.softcap, W,
            truth=None if truth is None else truth.of(full), tile=s.tile,
        )  # fmt: skip
        names = ("keys", "values", "mass_error", "output_error")
        for h, *parts in zip(full, *found, strict=True):
            done[i, h] = replace(done[i, h], **dict(zip(names, parts, strict=True)))
    nothing = [h for h in range(H) if layer.lengths[h] == 0 < T]
    return done | {(i, h): empty(layer.K[h], layer.V[h]) for h in nothing}


def _gather(
    layers: Sequence[LayerInput], places: list[Place], truths: dict[int, Stats | None]
) -> Bucket:
    """The bucket of some heads. Those of one layer that stand together are taken at once."""
    by_layer: dict[int, list[int]] = {}
    for i, h in places:
        by_layer.setdefault(i, []).append(h)

    def each(part: Callable[[LayerInput], torch.Tensor]) -> torch.Tensor:
        return torch.cat([part(layers[i])[heads] for i, heads in by_layer.items()])

    truth = None
    stats = [(truths[i], heads) for i, heads in by_layer.items()]
    known = [(found, heads) for found, heads in stats if found is not None]
    if len(known) == len(stats):
        parts = [found.of(heads) for found, heads in known]
        truth = Stats(*(torch.cat(x) for x in zip(*parts, strict=True)))
    weighted = layers[places[0][0]].weights is not None
    return Bucket(
        known=[(layers[i].known, h) for i, h in places],
        lengths=[layers[i].lengths[h] for i, h in places],
        Q=each(lambda layer: layer.Q),
        K=each(lambda layer: layer.K),
        V=each(lambda layer: layer.V),
        scores=each(lambda layer: layer.scores),
        W=each(lambda layer: _given(layer.weights)) if weighted else None,
        truth=truth,
    )


def _given(weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:  # only to narrow the type: layers of one bucket are alike
        raise ValueError("no weights")
    return weights


def _buckets(
    method: Method, layers: Sequence[LayerInput], some: list[int], room: Room, fit_limit: int
) -> list[list[Place]]:
    """Heads with work to do, longest first, in groups of similar length and bounded memory; each
    group by layer and head."""
    length = {
        (i, h): t
        for i in some
        for h, t in enumerate(layers[i].lengths)
        if 0 < t < layers[i].K.shape[1]
    }
    groups: list[list[Place]] = []
    left = 0
    for place in sorted(length, key=lambda place: (-length[place], place)):
        t = length[place]
        if left == 0 or length[groups[-1][0]] > _SPREAD * t:
            groups.append([])
            left = max(1, room.bytes // _head_bytes(method, layers[place[0]], t, fit_limit))
        groups[-1].append(place)
        left -= 1
    return [sorted(group) for group in groups]


def _head_bytes(method: Method, layer: LayerInput, t: int, fit_limit: int) -> int:
    """About what a head of `t` entries takes while its bucket is worked."""
    (_, T, d), dv = layer.K.shape, layer.V.shape[2]
    numbers = layer.K.element_size()
    rows = 2 * T * (d + dv) * numbers + 5 * t * (d + dv) * 4 + 6 * T * 8
    rows += layer.Q.shape[1] * (d * numbers + 2 * dv * 4)
    squares = 100 * min(t, fit_limit) ** 2  # the fits hold folds in float32, copies in float64
    if method.selection == "omp":
        steps = min(t, PURSUIT)
        M = min(T, screened(method.candidates, steps))
        squares += 4 * M * (layer.Q.shape[1] + 2 * steps)
    return rows + squares


def _join(heads: list[Head], lengths: Sequence[int], has_beta: bool) -> LayerResult:
    return LayerResult(
        heads=Entries.of(
            torch.cat([head.keys for head in heads]),
            torch.cat([head.values for head in heads]),
            torch.cat([head.beta for head in heads]) if has_beta else None,
            tuple(int(t) for t in lengths),
        ),
        index=torch.cat([head.index for head in heads]),
        mass_error=torch.stack([head.mass_error.float() for head in heads]),
        output_error=torch.stack([head.output_error.float() for head in heads]),
    )


def _check(method: Method, layer: LayerInput) -> None:
    Q, K, V, scores, lengths = layer.Q, layer.K, layer.V, layer.scores, layer.lengths
    H, T, d = K.shape
    if V.shape[:2] != (H, T):
        raise ValueError(f"{tuple(V.shape)} values for {tuple(K.shape)} keys")
    if Q.ndim != 3 or Q.shape[0] != H or Q.shape[2] != d:
        raise ValueError(f"{tuple(Q.shape)} queries for {tuple(K.shape)} keys")
    if scores.shape != (H, T):
        raise ValueError(f"{tuple(scores.shape)} scores for {tuple(K.shape)} keys")
    if layer.weights is not None and layer.weights.shape != Q.shape[:2]:
        raise ValueError(f"{tuple(layer.weights.shape)} weights for {tuple(Q.shape)} queries")
    if len(lengths) != H or any(not 0 <= t <= T for t in lengths):
        raise ValueError(f"lengths {list(lengths)} do not fit {H} heads of {T} keys")
    if all(t in (0, T) for t in lengths):
        return
    if method.selection == "all":
        raise ValueError(f"method {method.name!r} keeps every key; lengths must all be {T}")
    fits = method.selection == "omp" or method.mass != "none" or method.values != "original"
    if fits and Q.shape[1] == 0:
        raise ValueError(f"method {method.name!r} needs reference queries")
