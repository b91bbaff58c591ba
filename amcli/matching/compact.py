"""Compact one layer: select keys, fit biases, fit values, store head after head.

Heads of one layer differ in length by an order of magnitude, so they are worked in buckets of
similar length: padding stays below half, and memory below a bound that does not depend on the
longest head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from amcli.ragged import RaggedHeads

from .errors import FitErrors, fit_errors
from .mass import fit_beta
from .methods import LAMBDA_OF, Method, Rounding
from .scores import Stats, attention_stats
from .selection import CANDIDATE_CAP, Selection, omp, top
from .tiles import TILE_ELEMENTS, gather_rows, hide, working_dtype
from .values import fit_values

FIT_LIMIT = 512
"""Entries of one head that the fits may change. A longer head has its best FIT_LIMIT entries
fitted to what the others, kept as they are, leave of the mass and the outputs."""

PLENTY = 4
"""A head that keeps at least one key in PLENTY keeps those of highest score. Pursuit drops keys
that the reference queries see as near-duplicates of others, and questions of another kind may
tell them apart; it pays where most of a head has to go."""

GRAM_ELEMENTS = CANDIDATE_CAP**2
"""Elements of a bucket's largest square matrices, all heads together."""

_SPREAD = 1.5  # longest over shortest head of a bucket


@dataclass(frozen=True)
class LayerResult:
    """One compacted layer.

    heads         the entries, in order of position within each head
    index         `[N]` int32, position in the document of each entry, in the same order
    mass_error, output_error  `[H]`, see `errors.FitErrors`; 1 for an empty head

    Errors are over the reference queries, of the entries as stored; nan with no queries.
    """

    heads: RaggedHeads
    index: torch.Tensor
    mass_error: torch.Tensor
    output_error: torch.Tensor


class Known:
    """What compactions of one layer have in common when its queries, keys and values are the same.

    `kept`: what the whole document gives the queries is found once, for all methods and ratios.
    `nested`: every order of selection is kept too, and a shorter one is the beginning of a longer
    one, so that a search over ratios selects once. Only for calls with one method and one seed;
    the longer order was chosen among more candidates, so that what is selected may differ a
    little from what a call by itself selects.
    """

    def __init__(self, kept: bool = False, nested: bool = False) -> None:
        self.kept = kept
        self.nested = nested
        self._truth: Stats | None = None
        self._found: dict[Hashable, torch.Tensor] = {}
        self._orders: dict[int, torch.Tensor] = {}  # head -> positions, best first

    def truth(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        scale: float,
        softcap: float | None,
        tile: int = TILE_ELEMENTS,
    ) -> Stats | None:
        """Log mass and outputs of all heads; None with no queries."""
        if self._truth is not None:
            return self._truth
        found = None
        if Q.shape[1]:
            found = attention_stats(Q, K, V, scale, softcap=softcap, tile=tile)
        self._truth = found if self.kept else None
        return found

    def once(self, name: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives, from an earlier call of that name where there was one."""
        if name in self._found:
            return self._found[name]
        found = make()
        if self.kept:
            self._found[name] = found
        return found

    def order(self, heads: list[int], lengths: list[int]) -> torch.Tensor | None:
        """`[len(heads), t_max]`, the first `lengths` of each row real; None where not all known."""
        known = [self._orders.get(h) for h in heads]
        rows = [x for x, t in zip(known, lengths, strict=True) if x is not None and len(x) >= t]
        if len(rows) < len(heads):
            return None
        t_max = max(lengths)
        return torch.stack(
            [torch.nn.functional.pad(x[:t_max], (0, t_max - len(x[:t_max]))) for x in rows]
        )

    def remember(self, heads: list[int], lengths: list[int], index: torch.Tensor) -> None:
        """The orders `index [len(heads), t_max]` of some heads, for calls to come."""
        if self.nested:
            self._orders |= {
                h: index[i, :t] for i, (h, t) in enumerate(zip(heads, lengths, strict=True))
            }


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
    tile: int = TILE_ELEMENTS,
    fit_limit: int = FIT_LIMIT,
    gram_elements: int = GRAM_ELEMENTS,
) -> LayerResult:
    """Compact `K [H, T, d]`, `V [H, T, dv]` to `lengths[h]` entries a head.

    `Q [H, n, d]` reference queries, `weights [H, n]` their W (None: 1), `scores [H, T]` from
    `ScoreState` or the method's `score`. A head with `lengths[h] = T` keeps its own keys and
    values with beta 0, one with 0 gets no entry. Keys and values come back in the dtypes of
    `K` and `V`, beta in float32 (None for a method without one). `tile` and `gram_elements`
    bound the memory; raise the latter on a large GPU to work more heads at once. `known`: what
    earlier calls with the same queries, keys and values have found, and this one adds to.

    With `rounding` all keys and values come back rounded, in float32: keys are rounded as soon as
    they are selected, so that the fits make up for what that loses, values at the end.

    Raises ValueError when shapes, lengths and method do not fit each other.
    """
    H, T, _ = K.shape
    _check(method, Q, K, V, scores, lengths, weights)
    s = _Settings(scale, softcap, seed, tile, fit_limit, rounding)
    known = Known() if known is None else known
    stats = known.truth(Q, K, V, scale, softcap, tile) if known.kept else None

    def bucket(heads: list[int]) -> _Bucket:
        return _Bucket(
            heads, [lengths[h] for h in heads], Q[heads], K[heads], V[heads], scores[heads],
            None if weights is None else weights[heads],
            None if stats is None else stats.of(heads),
        )  # fmt: skip

    done = {h: _whole(K[h], V[h]) for h in range(H) if lengths[h] == T}
    if rounding is not None and done:
        b = bucket(list(done))
        found = round_whole(
            rounding, b.Q, b.K, b.V, scale, softcap, b.W, truth=b.truth, tile=tile
        )  # fmt: skip
        names = ("keys", "values", "mass_error", "output_error")
        for h, *parts in zip(b.heads, *found, strict=True):
            done[h] = replace(done[h], **dict(zip(names, parts, strict=True)))
    done |= {h: _empty(K[h], V[h]) for h in range(H) if lengths[h] == 0 < T}
    for heads in _buckets(lengths, T, method, fit_limit, gram_elements):
        part = _compact_bucket(method, bucket(heads), known, s)
        done |= dict(zip(heads, part, strict=True))
    return _join([done[h] for h in range(H)], lengths, method.has_beta)


def round_whole(
    rounding: Rounding,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    scale: float,
    softcap: float | None,
    weights: torch.Tensor | None,
    *,
    truth: Stats | None = None,
    tile: int = TILE_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(keys [H, T, d], values [H, T, dv], mass error [H], output error [H])` of heads that keep
    every key and lose only what `rounding` loses; errors are nan with no queries."""
    keys, values = rounding.round_keys(K), rounding.round_values(V)
    if Q.shape[1] == 0:
        unknown = keys.new_full((K.shape[0],), torch.nan)
        return keys, values, unknown, unknown
    if truth is None:
        truth = attention_stats(Q, K, V, scale, softcap=softcap, tile=tile)
    error = fit_errors(
        Q, keys, None, values, truth, scale, softcap=softcap, weights=weights, tile=tile
    )
    return keys, values, *error


@dataclass(frozen=True)
class _Settings:
    scale: float
    softcap: float | None
    seed: int
    tile: int
    fit_limit: int
    rounding: Rounding | None


@dataclass(frozen=True)
class _Head:
    """One finished head: the fields of `LayerResult` with the head's `t` rows."""

    keys: torch.Tensor
    values: torch.Tensor
    beta: torch.Tensor
    index: torch.Tensor
    mass_error: torch.Tensor
    output_error: torch.Tensor


def _whole(K: torch.Tensor, V: torch.Tensor) -> _Head:
    """A head that keeps every key, exactly."""
    T = K.shape[0]
    index = torch.arange(T, dtype=torch.int32, device=K.device)
    error = torch.zeros((), device=K.device)
    return _Head(K, V, torch.zeros(T, device=K.device), index, error, error)


def _empty(K: torch.Tensor, V: torch.Tensor) -> _Head:
    """A head that keeps nothing, and so misses all of its mass and output."""
    head = _whole(K[:0], V[:0])
    error = torch.ones((), device=K.device)
    return _Head(head.keys, head.values, head.beta, head.index, error, error)


@dataclass(frozen=True)
class _Bucket:
    """Some heads of a layer, all of `0 < t <= T`; `truth`, where it is known already."""

    heads: list[int]
    lengths: list[int]
    Q: torch.Tensor
    K: torch.Tensor
    V: torch.Tensor
    scores: torch.Tensor
    W: torch.Tensor | None
    truth: Stats | None


def _compact_bucket(method: Method, b: _Bucket, known: Known, s: _Settings) -> list[_Head]:
    """Select and fit the heads of one bucket, all of `0 < t < T`."""
    Q, K, V, W = b.Q, b.K, b.V, b.W
    if Q.shape[1] == 0:  # a method that wants no queries: nothing to fit, nothing to measure
        unknown = b.scores.new_full((len(b.lengths),), torch.nan)
        chosen = top(b.scores, b.lengths)
        keys, values = gather_rows(K, chosen.index), gather_rows(V, chosen.index)
        if s.rounding is not None:
            keys, values = s.rounding.round_keys(keys), s.rounding.round_values(values)
        return _split(chosen, keys, values, None, FitErrors(unknown, unknown))
    truth = b.truth
    if truth is None:
        truth = attention_stats(Q, K, V, s.scale, softcap=s.softcap, tile=s.tile)
    order = _select(method, b, truth, known, s)
    keys, values = gather_rows(K, order.index), gather_rows(V, order.index)  # [B, t_max, d]
    t = min(s.fit_limit, keys.shape[1])
    if s.rounding is not None:
        # Values in float32, or a half-precision fit would be rounded twice.
        keys, values = s.rounding.round_keys(keys), values.float()
        values[:, t:] = s.rounding.round_values(values[:, t:])
    rest = _rest(Q, keys, values, order.mask, s)
    mask = order.mask[:, :t]
    beta: torch.Tensor | None = None
    if method.mass == "nnls":
        beta = fit_beta(
            Q, keys[:, :t], truth.lse, scale=s.scale, softcap=s.softcap, weights=W, mask=mask,
            rest=None if rest is None else rest.lse, tile=s.tile,
        )  # fmt: skip
    C_v = fit_values(
        Q, keys[:, :t], beta, truth.Y, values[:, :t], scale=s.scale, softcap=s.softcap, weights=W,
        mask=mask, rest=rest, lam=LAMBDA_OF[method.values], tile=s.tile,
    )  # fmt: skip
    if s.rounding is not None:
        C_v = s.rounding.round_values(C_v)
    error = fit_errors(
        Q, keys[:, :t], beta, C_v, truth, s.scale, softcap=s.softcap, weights=W, mask=mask,
        rest=rest, tile=s.tile,
    )  # fmt: skip
    values = torch.cat([C_v, values[:, t:]], dim=1)
    if beta is not None:
        beta = torch.nn.functional.pad(beta, (0, keys.shape[1] - t))
    return _split(order, keys, values, beta, error)


def _select(method: Method, b: _Bucket, truth: Stats, known: Known, s: _Settings) -> Selection:
    by_score = top(b.scores, b.lengths)
    # With no more candidates than entries, pursuit could only reorder the best by score.
    plenty = [t * PLENTY >= b.K.shape[1] or t >= CANDIDATE_CAP for t in b.lengths]
    if method.selection != "omp" or all(plenty):
        return by_score
    index = known.order(b.heads, b.lengths)
    if index is None:
        index = omp(
            b.Q, b.K, truth.lse, b.scores, b.lengths, scale=s.scale, softcap=s.softcap,
            weights=b.W, Y=truth.Y, target=method.target, gamma=method.gamma, panel=method.panel,
            candidates=method.candidates, seed=s.seed, tile=s.tile,
        ).index  # fmt: skip
        known.remember(b.heads, b.lengths, index)
    kept = torch.tensor(plenty, device=index.device).unsqueeze(1)
    return Selection(torch.where(kept, by_score.index, index), by_score.mask)


def _rest(
    Q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, s: _Settings
) -> Stats | None:
    """What the entries beyond `fit_limit` give, kept as they are; None when there are none."""
    if keys.shape[1] <= s.fit_limit:
        return None
    beyond = slice(s.fit_limit, None)
    bias = hide(None, mask[:, beyond], working_dtype(Q, keys))
    return attention_stats(
        Q, keys[:, beyond], values[:, beyond], s.scale, softcap=s.softcap, bias=bias, tile=s.tile
    )


def _split(
    order: Selection,
    keys: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor | None,
    error: FitErrors,
) -> list[_Head]:
    """Drop the padding and put each head's entries in order of position."""
    # Padding sorts behind every real position.
    place = order.index.masked_fill(~order.mask, torch.iinfo(torch.int64).max).argsort(dim=1)
    index = order.index.gather(1, place).to(torch.int32)
    keys, values = gather_rows(keys, place), gather_rows(values, place)
    if beta is None:
        beta = torch.zeros(index.shape, device=index.device)
    beta = beta.gather(1, place).float()
    heads = []
    for h, t in enumerate(order.mask.sum(1).tolist()):
        heads.append(
            _Head(
                keys[h, :t],
                values[h, :t],
                beta[h, :t],
                index[h, :t],
                error.mass[h],
                error.output[h],
            )
        )
    return heads


def _join(heads: list[_Head], lengths: Sequence[int], has_beta: bool) -> LayerResult:
    return LayerResult(
        heads=RaggedHeads(
            torch.cat([head.keys for head in heads]),
            torch.cat([head.values for head in heads]),
            torch.cat([head.beta for head in heads]) if has_beta else None,
            tuple(int(t) for t in lengths),
        ),
        index=torch.cat([head.index for head in heads]),
        mass_error=torch.stack([head.mass_error.float() for head in heads]),
        output_error=torch.stack([head.output_error.float() for head in heads]),
    )


def _buckets(
    lengths: Sequence[int], T: int, method: Method, fit_limit: int, gram_elements: int
) -> list[list[int]]:
    """Heads with work to do, longest first, in groups of similar length and bounded squares."""
    groups: list[list[int]] = []
    room = 0
    todo = [h for h, t in enumerate(lengths) if 0 < t < T]
    for h in sorted(todo, key=lambda h: -lengths[h]):
        if room == 0 or lengths[groups[-1][0]] > _SPREAD * lengths[h]:
            groups.append([])
            t = lengths[h]
            M = min(T, t * method.candidates, CANDIDATE_CAP) if method.selection == "omp" else 0
            side = max(M, 2 * min(t, fit_limit))  # the fits hold float64 copies
            room = max(1, gram_elements // side**2)
        groups[-1].append(h)
        room -= 1
    return groups


def _check(
    method: Method,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    scores: torch.Tensor,
    lengths: Sequence[int],
    weights: torch.Tensor | None,
) -> None:
    H, T, d = K.shape
    if V.shape[:2] != (H, T):
        raise ValueError(f"{tuple(V.shape)} values for {tuple(K.shape)} keys")
    if Q.ndim != 3 or Q.shape[0] != H or Q.shape[2] != d:
        raise ValueError(f"{tuple(Q.shape)} queries for {tuple(K.shape)} keys")
    if scores.shape != (H, T):
        raise ValueError(f"{tuple(scores.shape)} scores for {tuple(K.shape)} keys")
    if weights is not None and weights.shape != Q.shape[:2]:
        raise ValueError(f"{tuple(weights.shape)} weights for {tuple(Q.shape)} queries")
    if len(lengths) != H or any(not 0 <= t <= T for t in lengths):
        raise ValueError(f"lengths {list(lengths)} do not fit {H} heads of {T} keys")
    if all(t in (0, T) for t in lengths):
        return
    if method.selection == "all":
        raise ValueError(f"method {method.name!r} keeps every key; lengths must all be {T}")
    fits = method.selection == "omp" or method.mass != "none" or method.values != "original"
    if fits and Q.shape[1] == 0:
        raise ValueError(f"method {method.name!r} needs reference queries")
