"""`amkv demo`: the main workflow on the packaged handbook, offline, with its numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amcli.commands import options as opt
from amcli.commands.conversation import answer
from amcli.commands.screen.console import Console
from amcli.commands.screen.terminal import printable
from amcli.commands.shared import PREFILL_ENDING, Stopwatch, load, typed, work
from amcli.errors import UsageError
from amcli.models.catalogue import POCKET
from amcli.pipeline.compaction.defaults import DEFAULT_RATIO
from amcli.system.files import EXTENSION, output_errors
from amcli.system.processes import require_one
from amcli.system.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from amcli.generator.dialogues import Question
    from amcli.models.loading import LoadedModel
    from amcli.pipeline.contexts.context import Context
    from amcli.system.progress import Progress

_NAME = "handbook"
_ENDINGS = (".txt", PREFILL_ENDING, EXTENSION)


def demo(
    ratio: opt.DemoRatio = int(DEFAULT_RATIO),
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="FOLDER",
            show_default=False,
            help="Leave the document and both artifacts in this new folder.",
        ),
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Try it all on a small handbook: no download, less than a minute.

    Prefills the handbook with pocket, the model that ships with amkv, compacts
    it, and asks three questions of the whole document and of the compact file.

    \b
      amkv demo
      amkv demo --ratio 50 --keep demo
    """
    console = Console(json, quiet, debug)
    require_one("show the same", "start one")
    watch = Stopwatch()
    with _folder(keep) as folder:
        record = _Demo(console, folder, ratio, watch).run()
    if keep is None:
        del record["files"]
    record["seconds"] = watch.record()
    if json:
        console.record(record)
    else:
        _say(console, _end(record))
    for line in _next(keep):
        console.note(line)


def _say(console: Console, lines: Iterator[str]) -> None:
    """Prints lines as soon as they are known; nothing with --json."""
    if not console.json:
        console.data("".join(f"{line}\n" for line in lines))


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """The folder to work in: one that is removed afterwards, or the one to keep."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="amkv-") as temporary:
            yield Path(temporary)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise UsageError(f"{keep} already exists", "name a new folder with --keep")
    with output_errors(keep):
        keep.mkdir(parents=True, exist_ok=True)
    try:
        yield keep
    except BaseException:
        for ending in _ENDINGS:
            (keep / f"{_NAME}{ending}").unlink(missing_ok=True)
        with suppress(OSError):
            keep.rmdir()
        raise


@dataclass
class _Demo:
    """Prefills, compacts and asks twice; everything goes through files, as it would by hand."""

    console: Console
    folder: Path
    ratio: float
    watch: Stopwatch

    def run(self) -> dict[str, Any]:
        """The record that `demo --json` prints, without seconds; reports progress on the way."""
        text, prefill, compact = (self.folder / f"{_NAME}{ending}" for ending in _ENDINGS)
        record: dict[str, Any] = {"document": text.name}
        with work(self.console) as progress:
            from amcli.generator import example
            from amcli.pipeline.compaction import compacting
            from amcli.pipeline.compaction.request import Request, check
            from amcli.pipeline.contexts import reading
            from amcli.pipeline.contexts.source import read_source

            request = Request(ratio=self.ratio)
            check(request)
            with output_errors(text):
                text.write_text(example.handbook().text + "\n", encoding="utf-8")
            questions = _one_of_each(example.questions())
            with self.watch.stage("load"):
                loaded = load(progress, POCKET, None, None)
            with self.watch.stage("prefill"):
                read = reading.prefill(loaded, read_source(str(text)), progress=progress)
                reading.save_prefill(read, prefill, overwrite=False)
            with self.watch.stage("ask_full"):
                context = _open(prefill, loaded)
                full = self._ask(context, questions, progress)
        record |= {"tokens": context.T, "model": loaded.id, "device": str(loaded.device)}
        _say(self.console, _was_read(record, context.cache.nbytes(), self.watch.stages))
        with work(self.console) as progress:
            with self.watch.stage("compact"):
                result = compacting.compact(context, request, progress=progress)
                result.save(compact, overwrite=False)
            with self.watch.stage("ask_compact"):
                small = self._ask(_open(compact, loaded), questions, progress)
        record |= {
            "method": result.plan.method.name,
            "ratio": round(result.ratio, 4),
            "full_bytes": result.full_bytes,
            "stored_bytes": result.stored_bytes,
            "questions": [
                {
                    "kind": question.kind,
                    "question": question.question,
                    "answer": question.answer,
                    "from_document": with_all,
                    "from_compact": with_few,
                    "document_right": with_all == question.answer,
                    "compact_right": with_few == question.answer,
                }
                for question, with_all, with_few in zip(questions, full, small, strict=True)
            ],
            "files": [str(text), str(prefill), str(compact)],
        }
        _say(self.console, _was_compacted(record, self.watch.stages))
        return record

    def _ask(self, context: Context, questions: list[Question], progress: Progress) -> list[str]:
        """Asks each question in its own conversation."""
        from amcli.pipeline.talk.session import Session

        session = Session(context, max_tokens=64)
        progress.start("ask", len(questions))
        answers = []
        for question in questions:
            session.reset()
            answers.append("".join(answer(session, question.question)))
            progress.advance()
        return answers


def _open(path: Path, loaded: LoadedModel) -> Context:
    from amcli.pipeline.contexts.opening import restore
    from amcli.storage.artifacts import Artifact

    with Artifact.open(path) as artifact:
        return restore(artifact, loaded)


def _one_of_each(questions: list[Question]) -> list[Question]:
    """The first question of each kind."""
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(question.kind, question)
    return list(first.values())


def _was_read(record: dict[str, Any], held: int, seconds: Mapping[str, float]) -> Iterator[str]:
    yield (
        f"1. {record['model']} read {record['document']} on {record['device']}: "
        f"{record['tokens']:,} tokens, in {seconds_text(seconds['load'] + seconds['prefill'])}"
    )
    yield f"   Its keys and values take {bytes_text(held)}."
    yield ""


def _was_compacted(record: dict[str, Any], seconds: Mapping[str, float]) -> Iterator[str]:
    full, stored = bytes_text(record["full_bytes"]), bytes_text(record["stored_bytes"])
    yield (
        f"2. compacted {record['ratio']:.1f}× with {record['method']} "
        f"in {seconds_text(seconds['compact'])}: {full} → {stored}"
    )
    yield ""
    yield "3. asked both"
    for asked in record["questions"]:
        yield ""
        yield f"   {asked['question']}  ({asked['kind']})"
        for source, size in (("document", full), ("compact", stored)):
            mark = "✓" if asked[f"{source}_right"] else "✗"
            label = f"{'whole' if source == 'document' else source}, {size}:"
            said = " ".join(printable(asked[f"from_{source}"]).split())
            yield f"   {mark} {label:<18} {shorten(said, 54, placeholder='…')}"
        if not (asked["document_right"] and asked["compact_right"]):
            yield f"     {'right would be:':<18} {asked['answer']}"


def _end(record: dict[str, Any]) -> Iterator[str]:
    yield ""
    right = sum(asked["compact_right"] for asked in record["questions"])
    yield (
        f"{right} of {len(record['questions'])} right from the compact file; "
        f"{seconds_text(record['seconds']['total'])} in all"
    )
    yield ""
    yield "Pocket was made for this demonstration. A real model of 1.5B parameters keeps"
    yield "99.6%, 98% and 92% of what a real document does to its answers at 10×, 20×, 40×:"
    yield "docs/benchmarks/real/real.md"


def _next(keep: Path | None) -> Iterator[str]:
    """What to type next."""
    yield "\ntry next:"
    folder = keep or Path(_NAME)
    context = folder / f"{_NAME}{EXTENSION}"
    if keep is None:
        yield _hint("the same, and keep the files", "demo", "--keep", folder)
    yield _hint("ask it yourself", "chat", "-c", context)
    yield _hint("compare with the whole", "chat", "-c", context, "--compare")
    yield _hint("where its entries are", "inspect", context, "--heads")
    yield _hint("your document", "compact", "report.txt", "--model", "Qwen/Qwen3-4B")


def _hint(what: str, *words: str | Path) -> str:
    return f"  {what:<30}{typed('amkv', *words)}"
