"""Contexts from artifacts: the model they need, whether it fits, their entries in its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from amcli.errors import ModelMismatchError, UsageError
from amcli.models.cache import CompactCache
from amcli.models.loading import LoadedModel, load
from amcli.models.memory import Preview
from amcli.models.state import placed, state_differences
from amcli.pipeline.contexts.context import Context, set_tail
from amcli.pipeline.contexts.joining import join
from amcli.pipeline.contexts.reading import for_length
from amcli.storage.artifacts import Artifact
from amcli.system.progress import SILENT, Progress


def model_of(artifact: Artifact) -> str:
    """The name that loads an artifact's model again, with its revision pinned."""
    model = artifact.manifest["model"]
    return model["id"] if model["revision"] is None else f"{model['id']}@{model['revision']}"


_ABSENT = ("model-missing", "model-not-a-folder", "model-incomplete", "model-is-gguf")
"""Codes of errors about a folder or file that holds no model."""


def misfits(artifact: Artifact, loaded: LoadedModel) -> list[str]:
    """Why an artifact does not fit a model, in words; empty if it does. Reads no tensor."""
    found = loaded.differences(artifact.manifest["model"], artifact.manifest["tokenizer"])
    # Without this, an absent state would be taken for that of an empty text.
    return found + state_differences(artifact.state_shapes(), loaded.geometry.kept)


def restore(artifact: Artifact, loaded: LoadedModel) -> Context:
    """The context of an artifact in a cache of `loaded`.

    Raises ModelMismatchError when the artifact was made for another model, saying what differs.
    """
    manifest, states = artifact.manifest, artifact.states()
    if found := misfits(artifact, loaded):
        wanted = model_of(artifact)
        changed = wanted in (loaded.id, f"{loaded.id}@{loaded.revision}")
        raise ModelMismatchError(
            f"{artifact.path} was made for another model than {loaded.id}: {'; '.join(found)}",
            "its files have changed since: put back those of before, or compact the document again"
            if changed
            else f"use the model {wanted}, or compact the document again for this one",
            code="wrong-model",
            field="model",
            path=artifact.path,
            model=loaded.id,
            wanted=wanted,
            differs=found,
            changed=changed,
        )
    T = artifact.logical_length
    loaded = for_length(loaded, T)
    cache = CompactCache.empty(loaded.geometry)
    for i, layer in enumerate(loaded.geometry.layers):
        place = loaded.geometry.devices[i]
        heads = loaded.shard.mine(artifact.heads(i, place)).to(place, loaded.dtype)
        if layer.type == "full" and artifact.kind == "compact":
            cache.set_prefix(i, heads, T)
        else:
            set_tail(cache, i, heads, loaded.dtype, T)
    cache.set_states(
        {
            (i, name): placed(name, state, loaded.geometry.state_devices[i], loaded.dtype)
            for (i, name), state in states.items()
        }
    )
    return Context(
        loaded,
        cache,
        artifact.token_ids(),
        manifest["document_start"],
        manifest["document_end"],
        manifest["boundary"],
        manifest["source"],
    )


Look = Callable[[Preview], None]
"""Called with a model's preview before its weights are read; an exception stops the loading."""


def unseen(preview: Preview) -> None:
    """A `Look` that does nothing."""


def load_model(
    spec: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust: bool = False,
    look: Look = unseen,
    progress: Progress = SILENT,
) -> LoadedModel:
    """`models.loading.load`, shown as a stage of work."""
    progress.start("load the model", 0)
    return load(spec, device=device, dtype=dtype, trust_remote_code=trust, look=look)


def open_contexts(
    paths: Sequence[Path],
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust: bool = False,
    look: Look = unseen,
    progress: Progress = SILENT,
) -> Context:
    """The contexts of artifacts joined in order, for the first one's model or the one named.

    Raises UsageError and ArtifactError for what cannot be opened, ModelMismatchError for what was
    made for another model, and whatever `load_model` and `joining.join` raise.
    """
    found: list[Context] = []
    for path in paths:
        with Artifact.open(path) as artifact:
            if not found:
                try:
                    loaded = load_model(
                        model or model_of(artifact),
                        device=device,
                        dtype=dtype,
                        trust=trust,
                        look=look,
                        progress=progress,
                    )
                except UsageError as error:
                    if model is not None or error.code not in _ABSENT:
                        raise
                    raise _moved(path, artifact, error) from error
            found.append(restore(artifact, loaded))
    return join(found)


def _moved(path: Path, artifact: Artifact, error: UsageError) -> UsageError:
    """What to say where nobody named the model, and it is not where the file says it was."""
    name = Path(artifact.manifest["model"]["id"]).name
    places = (folder / name for folder in (path.absolute().parent, Path.cwd()))
    now = next((x for x in places if x.is_file() or (x / "config.json").is_file()), None)
    return UsageError(
        f"the model that {path} was made with is not where it was: {error.message}",
        f"name its new place{'' if now is None else f', perhaps {now}'}, as the model",
        code="model-moved",
        field="model",
        path=path,
        now=now,
    )
