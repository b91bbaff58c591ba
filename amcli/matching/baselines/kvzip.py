"""KVzip: how much the model looks at a key while it repeats the context.

Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
arXiv 2505.23416. A key's score is the largest softmax probability that any query of the
repetition gives it, over the heads of a group. The context is repeated in parts of 2,048
tokens; a part's queries score only the part's own keys, in a softmax over the sinks, the part
and what was fed since. One top-k over all layers and heads sets the budgets; the uniform
variant gives every head the same. Keys and values stay as they are.

The instruction that asks for the repetition, and how it names a part, are those of
`pipeline.queries.prompts`, not the paper's.
"""

from __future__ import annotations

import torch

from amcli.matching.baselines.evicting import evict, keep
from amcli.matching.methods import SINKS, Look, ScoreContext
from amcli.matching.scores import ScoreState


class Replay:
    """Largest probability of each key so far, `[H, T]`; 0 for keys that no part was about."""

    def __init__(self) -> None:
        self.best: torch.Tensor | None = None

    def update(self, look: Look) -> None:
        """Scores the keys of the part that these queries repeat."""
        H, T, _ = look.K.shape
        if self.best is None:
            self.best = torch.zeros((H, T), device=look.K.device)
        part = torch.arange(look.part.start, look.part.stop, device=look.K.device)
        sinks = torch.arange(min(SINKS, look.part.start), device=look.K.device)
        seen = torch.cat([sinks, part])
        state = ScoreState(H, len(seen), device=look.K.device, kinds=["max"])
        Q, _, fed_limit = look.rows()
        state.update(Q, look.K[:, seen], look.logits, fed=look.fed, fed_limit=fed_limit)
        found = state.scores("max")[:, len(sinks) :]
        self.best[:, look.part] = torch.maximum(self.best[:, look.part], found)


def score(ctx: ScoreContext) -> torch.Tensor:
    """The largest probability; the first tokens of the context are kept."""
    if not isinstance(ctx.watched, Replay) or ctx.watched.best is None:
        raise ValueError("kvzip watches the context being repeated, and no query was given")
    return keep(ctx.watched.best, ctx.first(SINKS))


KVZIP = evict(
    "kvzip",
    score,
    watch=Replay,
    source="repeat",
    budget="global",
)

KVZIP_UNIFORM = evict("kvzip-uniform", score, watch=Replay, source="repeat")
