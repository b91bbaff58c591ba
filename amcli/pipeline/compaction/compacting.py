"""Compacts a context, at the size asked for or at the largest ratio that loses little enough."""

from __future__ import annotations

from amcli.pipeline.compaction.carrying import carry_out, measure, planned
from amcli.pipeline.compaction.fidelity import search
from amcli.pipeline.compaction.request import Request, check
from amcli.pipeline.compaction.result import Compaction
from amcli.pipeline.contexts.context import Context, require_finite
from amcli.pipeline.queries.passes import Passes
from amcli.storage.artifacts import NewArtifact
from amcli.system.clock import stopwatch
from amcli.system.progress import SILENT, Progress


def compact(
    context: Context,
    request: Request,
    *,
    progress: Progress = SILENT,
    passes: Passes | None = None,
    errors: bool = True,
    into: NewArtifact | None = None,
) -> Compaction:
    """Compacts a context whose full cache is loaded; the context itself does not change.

    `passes` keeps the reference passes of this context for later calls; a pass always reports the
    seconds it took when it ran. `errors` says whether to measure them, which reads a few hundred
    more tokens and changes nothing else; see `measure`. `into` is an artifact that takes each
    layer as soon as it is fitted and writes it while others are being fitted, unless the ratio has
    to be found first; finish it with `Compaction.finish`.

    Raises UsageError for a ratio, budget or method that does not fit, for a method that needs the
    model's RoPE where it cannot be found, and for a fidelity that cannot be reached or measured
    (`fidelity.search`).
    """
    check(request, context.T)  # before anything is looked at
    require_finite(context)
    if passes is None:
        passes = Passes(context, shared=False, search=request.share is not None)
    elif passes.context is not context:
        raise ValueError("the reference passes are those of another context")
    if request.share is not None:
        found = search(context, request, passes, progress=progress)
        if errors:
            measure(found, passes, progress)
        return found
    began = stopwatch(context.loaded.device)
    plan = planned(context, request, passes, progress)
    planning = stopwatch(context.loaded.device) - began
    found = carry_out(context, plan, passes, progress=progress, into=into)
    if errors:
        measure(found, passes, progress)
        found.seconds["errors"] += planning  # planning may have made the same queries
    return found
