"""`amkv compact --plan`: what would be done, with bytes and approximate seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from amcli.commands.failures import as_amkv_error
from amcli.commands.screen.console import Console
from amcli.commands.shared import choose_model, work
from amcli.entries.catalogue import NATIVE
from amcli.errors import AmkvError
from amcli.pipeline.compaction.defaults import FINE
from amcli.pipeline.contexts.source import Source
from amcli.storage.summary import in_all, stores_text
from amcli.system.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from amcli.models.memory import Preview
    from amcli.pipeline.compaction.choices import Changes
    from amcli.pipeline.compaction.estimate import Estimate
    from amcli.pipeline.compaction.plan import Plan
    from amcli.pipeline.compaction.request import Request


def show(
    console: Console,
    content: Source | Path,
    request: Request,
    model: str | None,
    device: str | None,
    dtype: str | None,
    trust: bool,
) -> None:
    """Prints the plan for a text or a prefill; no weights are read, and nothing is written."""
    with work(console) as progress:
        from amcli.pipeline.compaction.estimate import estimate
        from amcli.pipeline.compaction.fidelity import beginning
        from amcli.pipeline.compaction.plan import Target, decide
        from amcli.pipeline.compaction.request import check
        from amcli.storage.artifacts import Artifact

        progress.start("look at the model", 0)
        preview: Preview | None
        if isinstance(content, Source):
            preview = _preview(choose_model(console, model, "compact"), device, dtype, trust)
            target = Target.of_text(preview, content.text)
        else:
            with Artifact.open(content) as artifact:
                preview = _of_artifact(console, artifact, model, device, dtype, trust)
                target = Target.of_artifact(artifact, None if preview is None else preview.dtype)
        undecided = False

        def changes() -> Changes:
            nonlocal undecided
            undecided = True
            return dict.fromkeys(target.layers, 0.0)  # that of a cache which bears 4 bits

        check(request, target.T)
        share = request.share
        first = request if share is None else beginning(request, target.T)
        plan = decide(target, first, changes)
        found = estimate(plan, preview, prefilled=not isinstance(content, Source))
    record = {**plan.record(), "store_decided": not undecided, **found.record()}
    if share is not None:
        record["requested"]["fidelity"] = share
    console.result("\n".join(_lines(plan, found, undecided, share)), record)


def _preview(spec: str, device: str | None, dtype: str | None, trust: bool) -> Preview:
    from amcli.models.loading import preview

    return preview(spec, device=device, dtype=dtype, trust_remote_code=trust)


def _of_artifact(
    console: Console,
    artifact: Any,
    model: str | None,
    device: str | None,
    dtype: str | None,
    trust: bool,
) -> Preview | None:
    """The model of a prefill, if available: a plan needs it only for seconds."""
    from amcli.pipeline.contexts.opening import model_of

    try:
        return _preview(model or model_of(artifact), device, dtype, trust)
    except AmkvError as error:
        if model is not None:
            raise
        console.note(f"no time estimate: {as_amkv_error(error).message}")
        return None


def _lines(plan: Plan, found: Estimate, undecided: bool, share: float | None) -> Iterator[str]:
    """The plan for people, in 80 columns; of a search for the fidelity `share`, its beginning."""
    target, layers = plan.target, plan.layers
    heads = sum(x.shape.heads for x in layers)
    entries = sum(x.shape.heads * x.entries for x in layers) / max(1, heads)
    yield f"{target.T:,} tokens of {target.model}: {len(layers)} layers, {heads} heads to compact"
    yield (
        f"method {plan.method.name}, queries {plan.queries.name}, budget {plan.budget}, "
        f"seed {plan.seed}"
    )
    if share is not None:
        yield f"the ratio is found by trying: the largest with a fidelity of {share:g}"
        yield "  up to six are tried; what follows is for the first"
    full, stored = plan.full_bytes, plan.stored_bytes
    ratio = full / max(1, stored)
    yield (
        f"{bytes_text(full)} → {bytes_text(stored)}, "
        f"{ratio:.1f}× smaller{in_all(ratio, plan.whole_ratio)}"
    )
    said = stores_text(list(plan.stores.values()) or [NATIVE])
    yield from wrap(
        f"{entries:,.0f} entries a head on average, in {said}", 80, subsequent_indent="  "
    )
    if undecided:
        yield f"  or {FINE} where the cache needs it, with fewer entries: decided by looking"
    weights = "" if found.weights is None else f"{bytes_text(found.weights)} of weights, "
    yield (
        f"memory: {weights}{bytes_text(found.cache)} of cache, up to {bytes_text(found.fits)} "
        "for the fits"
    )
    if found.seconds is not None:
        stages = ", ".join(f"{name} {seconds_text(s)}" for name, s in found.seconds.items())
        yield f"time: about {seconds_text(sum(found.seconds.values()))} ({stages})"
        if "self-study" in plan.queries.sources:
            yield "  and what the model takes to ask itself questions"
