"""A folder of one's own, a small document, its artifacts, and the command line in it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

import amcli
import amkv_format
from amcli.commands.app import main
from amcli.generator.dialogues import Question, Questioner
from amcli.generator.documents import Document, generate

SOURCES = os.pathsep.join(
    str(Path(str(module.__file__)).parents[1]) for module in (amcli, amkv_format)
)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """What went wrong, without remarks about what was going on before."""
        return [line for line in self.err.splitlines() if line.startswith(("error:", "hint:"))]


Amkv = Callable[..., Result]


@pytest.fixture(scope="session")
def document() -> Document:
    return generate(7, 300)


@pytest.fixture(scope="session")
def question(document: Document) -> Question:
    found = Questioner(document).direct(Random(1))
    assert found is not None
    return found


@pytest.fixture(scope="session")
def document_start(document: Document) -> str:
    """The first words of the document."""
    return " ".join(document.text.split()[:3])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """For processes: as a stranger's would be, but for where Python finds this code."""
    dropped = ("HF_HOME", "COLUMNS", "NO_COLOR")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and not name.startswith("AMKV_")
    }
    old = os.environ.get("PYTHONPATH")
    path = SOURCES if not old else SOURCES + os.pathsep + old
    state = str(tmp_path / ".state")
    config = str(tmp_path / ".config")
    return {
        **kept,
        "PYTHONPATH": path,
        "XDG_CONFIG_HOME": config,
        "XDG_STATE_HOME": state,
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def here(tmp_path: Path, document: Document, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `doc.txt` in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "doc.txt").write_text(document.text + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ".state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    for name in [name for name in os.environ if name.startswith("AMKV_")]:
        monkeypatch.delenv(name)
    return folder


@pytest.fixture
def amkv(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Amkv:
    """Runs a command line in this process."""

    def run(*words: str | Path, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def process(here: Path, environment: dict[str, str]) -> Amkv:
    """Runs a command line in a process of its own."""

    def run(*words: str | Path, stdin: bytes = b"", **more: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "amcli", *map(str, words)],
            input=stdin,
            capture_output=True,
            cwd=here,
            env={**environment, **more},
            timeout=120,
            check=False,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def made(document: Document, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `doc.prefill.amkv` and `doc.amkv`; the latter holds every key."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        (folder / "doc.txt").write_text(document.text, encoding="utf-8")
        text, full, compact = (str(folder / f"doc{e}") for e in (".txt", ".prefill.amkv", ".amkv"))
        assert main(["prefill", text, "-o", full, "-q", "--model", "pocket"]) == 0
        assert main(["compact", full, "-o", compact, "-q", "--method", "keep"]) == 0
    return folder


@pytest.fixture
def full(here: Path, made: Path) -> Path:
    """`doc.prefill.amkv`, in the current folder."""
    return _linked(made / "doc.prefill.amkv", here)


@pytest.fixture
def compact(here: Path, made: Path) -> Path:
    """`doc.amkv`, in the current folder."""
    return _linked(made / "doc.amkv", here)


def _linked(path: Path, folder: Path) -> Path:
    (folder / path.name).write_bytes(path.read_bytes())
    return Path(path.name)
