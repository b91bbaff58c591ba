"""Documents measured in parallel, by processes that each load the model.

Useful for small models on a CPU, whose many short steps keep one core busy, not all. Which process
takes which document changes no number; the number of threads per process may change last digits.
"""

from __future__ import annotations

import multiprocessing
import platform
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty
from typing import Any

import torch

from amcli.errors import AmkvError
from amcli.evaluation import runner
from amcli.evaluation.results import Results
from amcli.evaluation.runner import Listener
from amcli.evaluation.settings import Settings
from amcli.evaluation.suites.base import Document
from amcli.models.failures import quiet
from amcli.models.loading import LoadedModel, load

_PATIENCE = 1.0  # seconds between checks that all processes are still alive


@dataclass(frozen=True)
class Spec:
    """How to load the model again: arguments of `models.loading.load`."""

    model: str
    device: str | None
    dtype: str | None
    trust: bool = False


@dataclass(frozen=True)
class _Job:
    """What every process gets."""

    spec: Spec
    settings: Settings
    documents: Sequence[Document]
    results: Results
    threads: int


def spread(spec: Spec, jobs: int) -> list[Spec]:
    """How each process loads the model: on one GPU after another if no device is named."""
    gpus = torch.cuda.device_count() if spec.device is None else 0
    return [replace(spec, device=f"cuda:{k % gpus}") if gpus else spec for k in range(jobs)]


def run(
    settings: Settings,
    loaded: LoadedModel,
    spec: Spec,
    documents: Sequence[Document],
    results: Results,
    listener: Listener,
    save: Callable[[], None],
    jobs: int = 1,
) -> None:
    """`runner.run` with `jobs` documents at a time; a single job runs in this process.

    `spec` loads the same model as `loaded`; if it names no device, processes are spread over all
    GPUs. An error in a process ends the run as an error in this one would.
    """
    todo = [index for index in range(len(documents)) if results.todo(index)]
    jobs = min(jobs, len(todo))
    if jobs <= 1:
        runner.run(settings, loaded, documents, results, listener, save)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    if loaded.device.type == "cpu":
        results.hardware = f"{jobs} processes, {threads} CPU threads each, {platform.machine()}"
    listener.start(f"{jobs} at a time", sum(len(results.todo(index)) for index in todo))
    # Spawn, not fork: threads and CUDA do not survive a fork.
    context = multiprocessing.get_context("spawn")
    tasks, found = context.Queue(), context.Queue()
    for task in [*todo, *[None] * jobs]:
        tasks.put(task)
    jobs_of = [_Job(s, settings, documents, results, threads) for s in spread(spec, jobs)]
    workers = [
        context.Process(target=_work, args=(job, tasks, found), daemon=True) for job in jobs_of
    ]
    try:
        for worker in workers:
            worker.start()
        gather(found, workers, results, listener, save)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def gather(
    found: Any, workers: Sequence[Any], results: Results, listener: Listener, save: Any
) -> None:
    """Collects what the processes send until each has reported that it is done."""
    left = len(workers)
    while left:
        try:
            kind, what = found.get(timeout=_PATIENCE)
        except Empty:
            dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
            if dead:
                raise AmkvError(
                    f"a process that measured documents ended with code {dead[0].exitcode}",
                    "it may have run out of memory: try fewer jobs",
                    code="process-ended",
                    field="jobs",
                    exit_code=dead[0].exitcode,
                ) from None
            continue
        if kind == "error":
            raise what
        if kind == "done":
            left -= 1
        elif kind == "document":
            listener.document(*what)
        else:
            seconds, cell = what
            key = cell["document"], cell["method"], cell["ratio"]
            results.documents[cell["document"]]["seconds"] = seconds
            results.cells[key] = cell
            listener.cell(results, *key[1:])
            listener.advance()
            save()


def _work(job: _Job, tasks: Any, found: Any) -> None:
    """One process: measures documents until none are left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    torch.set_num_threads(job.threads)
    try:
        spec = job.spec
        loaded = load(
            spec.model, device=spec.device, dtype=spec.dtype, trust_remote_code=spec.trust
        )
        with quiet():
            while (index := tasks.get()) is not None:
                runner.measure(
                    job.settings, loaded, job.documents, index, job.results, _Sender(found)
                )
        found.put(("done", None))
    except Exception as error:
        found.put(("error", error))


class _Sender:
    """A listener that forwards everything to the waiting parent process."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def start(self, stage: str, total: int) -> None:
        """Does nothing: stages of several documents at a time would be confusing."""

    def advance(self, units: int = 1) -> None:
        """Nothing."""

    def document(self, index: int, name: str, tokens: int) -> None:
        """A document has begun."""
        self._found.put(("document", (index, name, tokens)))

    def cell(self, results: Results, method: str, ratio: float | None) -> None:
        """Sends the newest cell."""
        cell = next(reversed(results.cells.values()))
        seconds = results.documents[cell["document"]]["seconds"]
        self._found.put(("cell", (seconds, cell)))
