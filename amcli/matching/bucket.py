"""Takes some heads, of any layers, from keys and queries to entries: select, fit, measure.

All heads of a bucket go through every step together, padded to the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amcli.matching.fit_errors import FitErrors, fit_errors
from amcli.matching.mass import fit_beta
from amcli.matching.methods import LAMBDA_OF, Method, Rounding
from amcli.matching.sample import Queries, Sample, orders
from amcli.matching.scores import Stats, attention_stats
from amcli.matching.selection import Selection, omp, top
from amcli.matching.tiles import TILE_ELEMENTS, Logits, gather_rows, hide, working_dtype
from amcli.matching.values import fit_values

FIT_LIMIT = 512
"""Most entries of one head that the fits may change. In a longer head the best FIT_LIMIT entries
are fitted to the mass and outputs that the others, kept as they are, leave over."""

PLENTY = 4
"""A head that keeps at least one key in PLENTY keeps those with the highest scores. Pursuit drops
keys that the reference queries see as near-duplicates, but other kinds of questions may tell them
apart; it pays only where most of a head has to go."""


@dataclass(frozen=True)
class Settings:
    """Settings common to all buckets."""

    logits: Logits
    seed: int
    tile: int
    fit_limit: int
    rounding: Rounding | None


@dataclass(frozen=True)
class Head:
    """One finished head: the fields of `methods.LayerResult` with the head's `t` rows."""

    keys: torch.Tensor
    values: torch.Tensor
    beta: torch.Tensor
    index: torch.Tensor
    mass_error: torch.Tensor
    output_error: torch.Tensor


def whole(K: torch.Tensor, V: torch.Tensor) -> Head:
    """A head that keeps every key, exactly."""
    T = K.shape[0]
    index = torch.arange(T, dtype=torch.int32, device=K.device)
    error = torch.zeros((), device=K.device)
    return Head(K, V, torch.zeros(T, device=K.device), index, error, error)


def empty(K: torch.Tensor, V: torch.Tensor) -> Head:
    """A head that keeps nothing, and so loses all of its mass and output."""
    head = whole(K[:0], V[:0])
    error = torch.ones((), device=K.device)
    return Head(head.keys, head.values, head.beta, head.index, error, error)


@dataclass(frozen=True)
class Bucket:
    """Some heads, all with `0 < t <= T`.

    owners  the sample of each head's layer, and the head's index in that layer
    """

    owners: list[tuple[Sample, int]]
    lengths: list[int]
    queries: Queries
    K: torch.Tensor
    V: torch.Tensor
    scores: torch.Tensor


def compact_bucket(method: Method, b: Bucket, s: Settings) -> list[Head]:
    """Select and fit the heads of one bucket, all with `0 < t < T`."""
    queries, K, V = b.queries, b.K, b.V
    if queries.count == 0:  # a method without queries: nothing to fit, nothing to measure
        unknown = b.scores.new_full((len(b.lengths),), torch.nan)
        chosen = top(b.scores, b.lengths)
        keys, values = gather_rows(K, chosen.index), gather_rows(V, chosen.index)
        if s.rounding is not None:
            keys = _rounded(s.rounding, keys, chosen, b.lengths)
            values = s.rounding.round_values(values)
        return _split(chosen, keys, values, None, FitErrors(unknown, unknown))
    order = _select(method, b, s)
    keys, values = gather_rows(K, order.index), gather_rows(V, order.index)  # [B, t_max, d]
    t = min(s.fit_limit, keys.shape[1])
    if s.rounding is not None:
        # Values in float32, otherwise a half-precision fit would be rounded twice.
        keys, values = _rounded(s.rounding, keys, order, b.lengths), values.float()
        values[:, t:] = s.rounding.round_values(values[:, t:])
    rest = _rest(queries.Q, keys, values, order.mask, s)
    mask = order.mask[:, :t]
    beta: torch.Tensor | None = None
    if method.mass == "nnls":
        others = None if rest is None else rest.lse
        beta = fit_beta(queries, s.logits, keys[:, :t], mask=mask, rest=others, tile=s.tile)
    C_v = fit_values(
        queries, s.logits, keys[:, :t], beta, values[:, :t], mask=mask, rest=rest,
        lam=LAMBDA_OF[method.values], tile=s.tile,
    )  # fmt: skip
    if s.rounding is not None:
        C_v = s.rounding.round_values(C_v)
    error = fit_errors(queries, s.logits, keys[:, :t], beta, C_v, mask=mask, rest=rest, tile=s.tile)
    values = torch.cat([C_v, values[:, t:]], dim=1)
    if beta is not None:
        beta = torch.nn.functional.pad(beta, (0, keys.shape[1] - t))
    return _split(order, keys, values, beta, error)


def _select(method: Method, b: Bucket, s: Settings) -> Selection:
    by_score = top(b.scores, b.lengths)
    # A head with more entries than candidates also keeps the best by score, but in the order of
    # the pursuit: the first FIT_LIMIT entries are the ones that are fitted.
    plenty = [t * PLENTY >= b.K.shape[1] for t in b.lengths]
    if method.selection != "omp" or all(plenty):
        return by_score
    index = orders(b.owners, b.lengths)
    if index is None:
        settings = method.pursuit(s.seed)
        index = omp(b.queries, s.logits, b.K, b.scores, b.lengths, settings, tile=s.tile).index
        for (sample, head), order, t in zip(b.owners, index, b.lengths, strict=True):
            sample.remember(head, order[:t])
    kept = torch.tensor(plenty, device=index.device).unsqueeze(1)
    return Selection(torch.where(kept, by_score.index, index), by_score.mask)


def _rounded(
    rounding: Rounding, keys: torch.Tensor, order: Selection, lengths: Sequence[int]
) -> torch.Tensor:
    """Selected keys `[B, t, d]` as they will be read back, rounded in order of position."""
    place = _by_position(order)
    rounded = rounding.round_keys(gather_rows(keys, place), lengths)
    return gather_rows(rounded, place.argsort(dim=1))


def _by_position(order: Selection) -> torch.Tensor:
    """`[B, t]`: where in the order of selection the entries are, by position; padding last."""
    # Padding sorts after every real position.
    index = order.index.masked_fill(~order.mask, torch.iinfo(torch.int64).max)
    return index.argsort(dim=1, stable=True)


def _rest(
    Q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, s: Settings
) -> Stats | None:
    """The attention of the entries beyond `fit_limit`, kept as they are; None if there are none."""
    if keys.shape[1] <= s.fit_limit:
        return None
    beyond = slice(s.fit_limit, None)
    bias = hide(None, mask[:, beyond], working_dtype(Q, keys))
    return attention_stats(Q, keys[:, beyond], values[:, beyond], s.logits, bias=bias, tile=s.tile)


def _split(
    order: Selection,
    keys: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor | None,
    error: FitErrors,
) -> list[Head]:
    """Drop the padding and put each head's entries in order of position."""
    place = _by_position(order)
    index = order.index.gather(1, place).to(torch.int32)
    keys, values = gather_rows(keys, place), gather_rows(values, place)
    if beta is None:
        beta = torch.zeros(index.shape, device=index.device)
    beta = beta.gather(1, place).float()
    heads = []
    for h, t in enumerate(order.mask.sum(1).tolist()):
        heads.append(
            Head(
                keys[h, :t],
                values[h, :t],
                beta[h, :t],
                index[h, :t],
                error.mass[h],
                error.output[h],
            )
        )
    return heads


def round_whole(
    rounding: Rounding,
    queries: Queries,
    logits: Logits,
    K: torch.Tensor,
    V: torch.Tensor,
    *,
    tile: int = TILE_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(keys [H, T, d], values [H, T, dv], mass error [H], output error [H])` of heads that keep
    every key and lose only what `rounding` loses; errors are nan with no queries."""
    keys, values = rounding.round_keys(K, [K.shape[1]] * K.shape[0]), rounding.round_values(V)
    if queries.count == 0:
        unknown = keys.new_full((K.shape[0],), torch.nan)
        return keys, values, unknown, unknown
    return keys, values, *fit_errors(queries, logits, keys, None, values, tile=tile)
