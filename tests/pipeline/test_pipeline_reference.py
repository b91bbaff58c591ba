"""What a reference pass says of its queries, against one softmax a query in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from boxes import model, source

from amcli.models.generate import absorb
from amcli.pipeline.contexts.context import live_keys
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.queries import reference
from amcli.pipeline.queries.passages import repeat_passages
from amcli.pipeline.queries.reference import collect
from amcli.system.progress import Silent


@pytest.mark.parametrize("chunk", [4096, 100])
@pytest.mark.parametrize("name", ["pocket", "gemma2"])
def test_scores_shares_and_outputs_are_those_of_one_softmax(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gemma2 has a softcap, so that no kernel hands over the masses."""
    monkeypatch.setattr(reference, "CHUNK", chunk)
    context = prefill(model(name), source(150))
    [passage] = repeat_passages(context)
    found = collect(context, [passage], max_queries=10**6, kinds=("max", "rms"), progress=Silent())
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(index: int, query: torch.Tensor, layer: Any, *more: Any) -> None:
        seen[index] = (query[0].double(), layer.live()[0][0].double())

    cache = context.cache.fork()
    with cache.observe(watch):
        absorb(context.loaded.model, cache, passage.ids, len(passage.ids))
    T, first = context.T, passage.first
    for index, got in found.items():
        query, keys = seen[index]
        H, m = len(keys), query.shape[1]
        Q = query.view(H, -1, m, query.shape[2])
        S = torch.einsum("hgmd,htd->hgmt", Q, keys) * got.sample.logits.scale
        softcap = got.sample.logits.softcap
        if softcap is not None:
            S = softcap * torch.tanh(S / softcap)
        later = torch.arange(T + m) > torch.arange(T, T + m).unsqueeze(1)
        S = S.masked_fill(later, -torch.inf)[:, :, first:]
        P = S.softmax(-1)[..., :T].flatten(1, 2)  # [H, rows, T]
        Y = S[..., :T].softmax(-1).flatten(1, 2) @ live_keys(context, index)[1].double()
        assert not got.sample.waits
        asked = got.sample.queries(*live_keys(context, index))
        if chunk > m:  # else the rows come a chunk at a time
            close(asked.weights, P.sum(-1))
            close(asked.Y, Y)
        close(asked.weights.sum(1), P.sum((1, 2)))
        close(got.scores.scores("max"), P.amax(1))
        close(got.scores.scores("rms"), P.square().mean(1).sqrt())


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-3)
