"""The steps of a compaction: plan; reference pass, budgets and the fits of all layers; errors."""

from __future__ import annotations

from dataclasses import replace

import torch

from amcli.matching.methods import FUTURE, ScoreContext
from amcli.models.rotary import Rotary
from amcli.pipeline.compaction import early, heldout
from amcli.pipeline.compaction.choices import Changes, coarse_changes, worst_rounding
from amcli.pipeline.compaction.fitting import fit, sample_of
from amcli.pipeline.compaction.plan import Plan, Target, decide
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context, full_layers, live_keys
from amcli.pipeline.queries.passes import Passes, references
from amcli.pipeline.queries.reference import LayerReference
from amcli.storage.artifacts import NewArtifact
from amcli.system.clock import stopwatch
from amcli.system.progress import SILENT, Progress


def planned(context: Context, request: Request, passes: Passes, progress: Progress) -> Plan:
    """The plan for compacting a context as requested; see `plan.decide` for what it raises."""

    def changes() -> Changes:
        held = held_out(context, request.seed, passes, progress)
        found, _ = passes.get(("changes", request.seed), lambda: coarse_changes(context, held))
        return found

    return decide(Target.of(context), request, changes)


def carry_out(
    context: Context,
    plan: Plan,
    passes: Passes,
    *,
    progress: Progress = SILENT,
    into: NewArtifact | None = None,
) -> Compaction:
    """Carries out a plan, without measuring errors. See `compacting.compact`."""
    method, rotary = plan.method, None
    if method.rope or method.rerotate:
        rotary = Rotary(context.loaded.model, context.loaded.geometry)
    asking, seconds = references(context, method, plan.queries, rotary, passes, progress)

    began = stopwatch(context.loaded.device)
    scores = [
        _scores(context, plan, order, asking.get(layer), rotary)
        for order, layer in enumerate(full_layers(context))
    ]
    shard = context.loaded.shard
    lengths = plan.allocate([shard.gathered(part) for part in scores])
    written = None
    if into is not None and shard.size == 1:
        written = early.begin(into, context, plan, lengths)
    layers, positions = fit(context, plan, asking, scores, lengths, rotary, progress, written)
    seconds["compact"] = stopwatch(context.loaded.device) - began
    count = max((r.count for r in asking.values()), default=0)
    asked = max((r.asked for r in asking.values()), default=0)
    return Compaction(context, plan, layers, count, asked, seconds, positions=positions)


def held_out(
    context: Context, seed: int, passes: Passes, progress: Progress
) -> dict[int, LayerReference]:
    """Held-out queries, which no fit sees; made once per context."""
    held, _ = passes.get(("held-out", seed), lambda: heldout.queries(context, seed, progress))
    return held


def measure(found: Compaction, passes: Passes, progress: Progress) -> None:
    """Fills in a compaction's errors on held-out queries and the seconds this took.

    Where a store was asked for by name, what its rounding does is measured too.
    """
    context, plan = found.context, found.plan
    began = stopwatch(context.loaded.device)
    held = held_out(context, plan.seed, passes, progress)
    found.errors = heldout.measure(context, found.layers, held)
    if plan.named:
        found.rounding = worst_rounding(context, held, plan.stores)
    found.seconds["errors"] = stopwatch(context.loaded.device) - began


def _scores(
    context: Context,
    plan: Plan,
    order: int,
    found: LayerReference | None,
    rotary: Rotary | None,
) -> torch.Tensor:
    """`[H, T]`: how much each key of the plan's layer `order` matters, by the method's own rule."""
    method, layer = plan.method, plan.layers[order]
    K, V = live_keys(context, layer.layer)
    if method.score is None:
        if found is None:
            return K.new_zeros(K.shape[:2], dtype=torch.float32)
        return found.ranked(method.score_kind)
    ctx = ScoreContext(
        sample=sample_of(found, K),
        K=K,
        V=V,
        layer=order,
        layers=len(plan.layers),
        seed=plan.seed,
        entries=layer.entries,
        budget=plan.budget,
        window=plan.queries.window,
    )
    if method.rope and rotary is not None:
        future = torch.arange(context.T, context.T + FUTURE)
        rotation = rotary.mean(layer.layer, future, K.shape[-1]).to(K.device)
        ctx = replace(ctx, rotation=rotation)
    if found is not None:
        ctx = replace(ctx, watched=found.watched)
    return method.score(ctx)
