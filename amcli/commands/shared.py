"""What several commands share: choosing and loading a model, timing stages, finding the last
prefill."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from amcli.commands.screen.console import Console
from amcli.commands.screen.terminal import is_terminal, printable
from amcli.errors import UsageError
from amcli.models.catalogue import POCKET
from amcli.pipeline.contexts.source import STDIN, Source, read_source
from amcli.system import settings
from amcli.system.files import looks_like_artifact
from amcli.system.processes import require_one
from amcli.system.progress import Progress

if TYPE_CHECKING:
    from amcli.models.loading import LoadedModel
    from amcli.models.memory import Preview
    from amcli.pipeline.contexts.context import Context

PREFILL_ENDING = ".prefill.amkv"


class Stopwatch:
    """Seconds of each stage of a command, and in total."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block as `name`."""
        began = time.perf_counter()
        yield
        self.stages[name] = time.perf_counter() - began

    @property
    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._began

    def record(self) -> dict[str, float]:
        """All stages and the `total`, to the millisecond."""
        return {name: round(s, 3) for name, s in {**self.stages, "total": self.total}.items()}


@contextmanager
def work(console: Console) -> Iterator[Progress]:
    """Progress of work that runs a model; the libraries stay silent inside the block."""
    with console.progress() as progress:
        progress.start("load libraries", 0)
        from amcli.models.failures import quiet

        with quiet():
            yield progress


def choose_model(console: Console, named: str | None, command: str) -> str:
    """`--model`, else the command's setting, else pocket, with a line that says which.

    Not an option default, because artifacts name their own model.
    """
    if named is not None:
        return named
    if (setting := settings.of(command).get("model")) is not None:
        console.note(f"using {setting.value}, by {setting.origin}")
        return str(setting.value)
    console.note("using pocket, a demonstration model; for a real one: --model Qwen/Qwen3-4B")
    return POCKET


def load(
    progress: Progress,
    spec: str,
    device: str | None,
    dtype: str | None,
    *,
    trust: bool = False,
    console: Console | None = None,
    source: Source | None = None,
) -> LoadedModel:
    """Loads a model; first tells the console what it is and how long a document may be.

    A `source` that cannot fit is refused before the weights are read. For errors see
    `models.loading.load`.
    """
    from amcli.pipeline.contexts import opening

    look = _told(console, source)
    return opening.load_model(
        spec, device=device, dtype=dtype, trust=trust, look=look, progress=progress
    )


def _told(console: Console | None, source: Source | None = None) -> Callable[[Preview], None]:
    """Tells the console about a model, and refuses a document that cannot fit."""

    def look(preview: Preview) -> None:
        if console is not None and preview.id != POCKET:
            console.note(preview.line())
            for note in preview.notes:
                console.note(note)
        if source is not None:
            preview.require_document(source.name, source.text)

    return look


def open_contexts(
    progress: Progress,
    paths: Sequence[Path],
    model: str | None,
    device: str | None,
    dtype: str | None,
    *,
    trust: bool = False,
    console: Console | None = None,
) -> Context:
    """`opening.open_contexts`, which also tells the console about the model."""
    from amcli.pipeline.contexts import opening

    return opening.open_contexts(
        paths,
        model=model,
        device=device,
        dtype=dtype,
        trust=trust,
        look=_told(console),
        progress=progress,
    )


def warn_of_length(console: Console, context: Context) -> None:
    """Prints a line if a context is longer than its model was trained for."""
    from amcli.models.lengths import past_training

    warning = past_training(context.loaded.model.config, context.T)
    if warning is not None:
        console.note(f"warning: {warning}")


def read_document(console: Console, documents: Sequence[str]) -> Source:
    """Files or standard input as one document; prints a line for each file read.

    Raises UsageError for an artifact among them, and whatever `source.read_source` raises.
    """
    for document in documents:
        if document == STDIN:
            require_one("share standard input", "write the document to a file")
        if document == STDIN and is_terminal(sys.stdin):
            console.note("reading the document from the terminal; Ctrl-D ends it")
        if document != STDIN and looks_like_artifact(Path(document)) and Path(document).is_file():
            raise UsageError(
                f"{document} is an artifact, not a text",
                f"to go on with it: {typed('amkv', 'compact', document)}",
            )
    source = read_source(*documents)
    for file in source.files:
        pages = "" if file.pages is None else f"{file.pages:,} pages, "
        console.note(f"read {printable(file.name)}: {pages}{file.characters:,} characters")
    return source


def refuse_same(output: Path, source: Path) -> None:
    """Raises UsageError if the output would replace its own source."""
    with suppress(OSError):
        if output.samefile(source):
            raise UsageError(
                f"{output} is the source: it would be replaced", "name another file with -o"
            )


def typed(*words: str | Path) -> str:
    """A command line as one would type it."""
    return shlex.join(str(word) for word in words)
