"""Compact layers: distribute their heads into buckets, and reassemble the results.

Heads differ in length by an order of magnitude, so they are processed in buckets of similar length:
padding stays below half. A bucket takes heads of any layer, as many as there is room for: a GPU
needs few large steps, not many small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from amcli.entries.matrix import UnstorableError
from amcli.entries.ragged import Entries
from amcli.matching.bucket import (
    FIT_LIMIT,
    Bucket,
    Head,
    Settings,
    compact_bucket,
    empty,
    round_whole,
    whole,
)
from amcli.matching.methods import LayerInput, LayerResult, Method, Rounding
from amcli.matching.sample import Queries, check_shapes
from amcli.matching.selection import PURSUIT, screened
from amcli.matching.tiles import Room, room_on

_SPREAD = 1.5  # longest over shortest head of a bucket


Place = tuple[int, int]
"""A layer, by its index among those given, and one of its heads."""


def compact_layers(
    method: Method,
    layers: Sequence[LayerInput],
    *,
    seed: int = 0,
    roundings: Sequence[Rounding | None] | None = None,
    room: Room | None = None,
    fit_limit: int = FIT_LIMIT,
    advance: Callable[[int], None] = lambda heads: None,
) -> Iterator[tuple[int, LayerResult]]:
    """Compact layers, each to its own lengths; yields each, with its index among those given, as
    soon as its heads are finished.

    A head of length `T` keeps its own keys and values with beta 0; a head of length 0 gets no
    entry. Keys and values come back in the dtypes of `K` and `V`, beta in float32 (None for a
    method without one). `room` bounds the memory used besides inputs and results. `advance` is
    called with the number of heads finished since the last call.

    `roundings` has one for each layer, or None. With a rounding, all keys and values of the layer
    come back rounded, in float32: keys are rounded as soon as they are selected, so the fits can
    make up for the loss; values are rounded at the end.

    Raises ValueError when shapes, lengths and method do not fit each other, UnstorableError with
    the `layer` for numbers that its rounding cannot take.
    """
    roundings = [None] * len(layers) if roundings is None else roundings
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

    alike = [(*_alike(layer), id(own)) for layer, own in zip(layers, roundings, strict=True)]
    for group in dict.fromkeys(alike):
        some = [i for i, other in enumerate(alike) if other == group]
        like = layers[some[0]]
        own = room_on(like.K.device) if room is None else room
        s = Settings(like.sample.logits, seed, own.tile, fit_limit, roundings[some[0]])
        for i in some:
            with _in_layer([i] * len(layers[i].lengths)):
                trivial = _trivial(layers[i], i, s)
            done |= trivial
            advance(len(trivial))
            yield from finished([i])
        for places in _buckets(method, layers, some, own, fit_limit):
            with _in_layer([i for i, _ in places]):
                found = compact_bucket(method, _gather(layers, places, s), s)
            done |= dict(zip(places, found, strict=True))
            advance(len(places))
            yield from finished(sorted({i for i, _ in places}))


def compact_layer(
    method: Method,
    layer: LayerInput,
    *,
    seed: int = 0,
    rounding: Rounding | None = None,
    room: Room | None = None,
    fit_limit: int = FIT_LIMIT,
) -> LayerResult:
    """One layer alone; see `compact_layers`."""
    found = compact_layers(
        method, [layer], seed=seed, roundings=[rounding], room=room, fit_limit=fit_limit
    )
    return next(found)[1]


@contextmanager
def _in_layer(layers: Sequence[int]) -> Iterator[None]:
    """Says in which layer a number is that cannot be stored; `layers` has that of each head."""
    try:
        yield
    except UnstorableError as error:
        error.layer = layers[error.head or 0]
        raise


def _alike(layer: LayerInput) -> tuple[object, ...]:
    """Heads of two layers may share a bucket if this is equal for both."""
    x, K, V = layer.sample, layer.K, layer.V
    shapes = (x.Q.shape[1:], K.shape[1:], V.shape[1:])
    return (*shapes, K.dtype, K.device, x.logits, x.W is not None, x.waits)


def _trivial(layer: LayerInput, i: int, s: Settings) -> dict[Place, Head]:
    """The heads that keep all of their keys, or none."""
    H, T, _ = layer.K.shape
    full = [h for h in range(H) if layer.lengths[h] == T]
    done = {(i, h): whole(layer.K[h], layer.V[h]) for h in full}
    if s.rounding is not None and full:
        K, V = layer.K[full], layer.V[full]
        queries = _asked([(layer, full)], K, V, s)
        found = round_whole(s.rounding, queries, s.logits, K, V, tile=s.tile)
        names = ("keys", "values", "mass_error", "output_error")
        for h, *parts in zip(full, *found, strict=True):
            done[i, h] = replace(done[i, h], **dict(zip(names, parts, strict=True)))
    nothing = [h for h in range(H) if layer.lengths[h] == 0 < T]
    return done | {(i, h): empty(layer.K[h], layer.V[h]) for h in nothing}


def _gather(layers: Sequence[LayerInput], places: list[Place], s: Settings) -> Bucket:
    """The bucket of some heads. Adjacent heads of one layer are taken at once."""
    by_layer: dict[int, list[int]] = {}
    for i, h in places:
        by_layer.setdefault(i, []).append(h)
    parts = [(layers[i], heads) for i, heads in by_layer.items()]

    def each(part: Callable[[LayerInput], torch.Tensor]) -> torch.Tensor:
        return torch.cat([part(layer)[heads] for layer, heads in parts])

    K, V = each(lambda layer: layer.K), each(lambda layer: layer.V)
    return Bucket(
        owners=[(layers[i].sample, h) for i, h in places],
        lengths=[layers[i].lengths[h] for i, h in places],
        queries=_asked(parts, K, V, s),
        K=K,
        V=V,
        scores=each(lambda layer: layer.scores),
    )


def _asked(
    parts: Sequence[tuple[LayerInput, list[int]]], K: torch.Tensor, V: torch.Tensor, s: Settings
) -> Queries:
    """The queries of some heads of each layer, with keys `K` and values `V`, and their attention to
    the document: from the samples, or computed for these heads alone."""
    if not parts[0][0].sample.waits:
        found = [layer.sample.queries(layer.K, layer.V, s.tile).of(heads) for layer, heads in parts]
        return Queries.joined(found)
    Q = torch.cat([layer.sample.Q[heads] for layer, heads in parts])
    W = [layer.sample.W[heads] for layer, heads in parts if layer.sample.W is not None]
    return Queries.over(Q, torch.cat(W) if W else None, K, V, s.logits, s.tile)


def _buckets(
    method: Method, layers: Sequence[LayerInput], some: list[int], room: Room, fit_limit: int
) -> list[list[Place]]:
    """Heads with work to do, longest first, in groups of similar length and bounded memory; within
    a group by layer and head."""
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
    """Roughly the bytes that a head of `t` entries takes while its bucket is processed."""
    (_, T, d), dv, n = layer.K.shape, layer.V.shape[2], layer.sample.Q.shape[1]
    numbers = layer.K.element_size()
    rows = 2 * T * (d + dv) * numbers + 5 * t * (d + dv) * 4 + 6 * T * 8
    rows += n * (d * numbers + 2 * dv * 4)
    squares = 100 * min(t, fit_limit) ** 2  # the fits hold folds in float32, copies in float64
    if method.selection == "omp":
        steps = min(t, PURSUIT)
        M = min(T, screened(method.candidates, steps))
        squares += 4 * M * (n + 2 * steps)
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
    Q, K, V, scores, lengths = layer.sample.Q, layer.K, layer.V, layer.scores, layer.lengths
    H, T, _ = K.shape
    if V.shape[:2] != (H, T):
        raise ValueError(f"{tuple(V.shape)} values for {tuple(K.shape)} keys")
    check_shapes(Q, layer.sample.W, K)
    if scores.shape != (H, T):
        raise ValueError(f"{tuple(scores.shape)} scores for {tuple(K.shape)} keys")
    if len(lengths) != H or any(not 0 <= t <= T for t in lengths):
        raise ValueError(f"lengths {list(lengths)} do not fit {H} heads of {T} keys")
    if all(t in (0, T) for t in lengths):
        return
    if method.selection == "all":
        raise ValueError(f"method {method.name!r} keeps every key; lengths must all be {T}")
    fits = method.selection == "omp" or method.mass != "none" or method.values != "original"
    if fits and Q.shape[1] == 0:
        raise ValueError(f"method {method.name!r} needs reference queries")
