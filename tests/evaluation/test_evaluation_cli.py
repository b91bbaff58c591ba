"""`amkv eval` as it is typed."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from amcli.commands.app import main
from amcli.commands.eval_table import LiveTable, table_text
from amcli.evaluation import makers, plot, runner

SMALL = ("--docs", "1", "--questions", "2", "--tokens", "200", "--method", "keep,knorm")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMKV_MODEL", raising=False)
    return tmp_path


def run(capsys: Captured, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["eval", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_table_plot_and_resumption(
    capsys: Captured, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*SMALL, "--ratio", "4,8", "-o", "r.json")
    code, out, err = run(capsys, *words, "--json")
    record = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert "document 1 of 1: register 0" in err
    assert record["complete"]
    pairs = [(row["method"], row["ratio"]) for row in record["rows"] if row["kind"] == "all"]
    assert pairs == [("full", None), ("none", None), ("keep", 1), ("knorm", 4), ("knorm", 8)]
    file = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert {key: file[key] for key in record} == record
    assert len(file["cells"]) == 5
    assert set(record) | set(record["rows"][0]) <= documented()

    monkeypatch.setattr(runner._Bench, "cell", None)  # nothing is measured a second time
    code, out, err = run(capsys, *words, "--plot", "p.png")
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[:6]] == [
        "method", "full", "no", "keep", "knorm", "knorm",
    ]  # fmt: skip
    assert lines[-1].startswith("register: 1 document of ")
    assert "r.json has 5 of 5 cells" in err
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert run(capsys, *words, "--plot", "p.svg", "-q")[::2] == (0, "")
    assert b"<svg" in Path("p.svg").read_bytes()

    code, _, err = run(capsys, *words, "--seed", "1")
    assert code == 2
    assert "r.json was made with other settings: seed 0 there, 1 here" in err
    assert "hint: name another file with -o, or start over with --force" in err


def documented() -> set[str]:
    """Names of the fields in the section of docs/json.md."""
    path = Path(__file__).parents[2] / "docs" / "json.md"
    section = path.read_text(encoding="utf-8").partition("## `amkv eval --json`")[2]
    cells = re.findall(r"^\| (`[^|]*`) \|", section.partition("\n## ")[0], re.MULTILINE)
    return set(re.findall(r"`(\w+)`", " ".join(cells)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--suite", "registr"), "unknown suite 'registr'"),
        (("--method", "opm"), "unknown method 'opm'"),
        (("--method", ","), "--method names no method"),
        (("--ratio", "5,x"), "--ratio x is not a number"),
        (("--ratio", "0.5"), "--ratio 0.5 is below 1"),
        (("--docs", "0"), "--docs 0 is below 1"),
        (("--suite", "quality"), "suite quality wants a file"),
        (("nothing.json", "--suite", "quality"), "no such file: nothing.json"),
        (("nothing.txt", "--suite", "perplexity"), "no such file: nothing.txt"),
        (("--plot", "p.gif"), "--plot p.gif is no picture"),
        (("-o", "nowhere/r.json"), "the folder nowhere does not exist"),
    ],
)
def test_an_error_is_one_line_and_a_hint(
    capsys: Captured, words: tuple[str, ...], said: str
) -> None:
    code, out, err = run(capsys, *words, "--model", "pocket")
    lines = err.splitlines()
    assert (code, out) == (2, "")
    assert lines[0].startswith(f"error: {said}")
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]


def test_a_plot_without_matplotlib_says_what_to_install(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, *SMALL, "--plot", "p.png", "--model", "pocket")
    assert code == 2
    assert err == "error: --plot needs matplotlib\nhint: pip install 'amkv[plots]'\n"


def test_an_interrupted_run_says_how_to_go_on(
    capsys: Captured, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = runner._Bench.cell

    def stops(bench: Any, method: str, ratio: float | None) -> Any:
        if method == "none":
            raise KeyboardInterrupt
        return measured(bench, method, ratio)

    monkeypatch.setattr(runner._Bench, "cell", stops)
    code, out, err = run(capsys, *SMALL, "-o", "r.json", "--ratio", "5")
    assert (code, out) == (130, "")
    assert "what is done is in r.json; the same command goes on from there" in err
    assert len(json.loads(Path("r.json").read_text(encoding="utf-8"))["cells"]) == 1


def test_documents_side_by_side_give_what_one_after_another_gives(
    capsys: Captured, here: Path
) -> None:
    words = ("--docs", "2", "--questions", "2", "--tokens", "150", "--method", "omp,knorm")
    words = (*words, "--ratio", "5", "--model", "pocket", "-q")
    assert run(capsys, *words, "-o", "one.json")[0] == 0
    assert run(capsys, *words, "-o", "two.json", "--jobs", "2")[0] == 0
    one, two = (json.loads(Path(f"{n}.json").read_text(encoding="utf-8")) for n in ("one", "two"))
    assert two["complete"]
    assert "2 processes" in two["hardware"]
    for mine, theirs in zip(one["cells"], two["cells"], strict=True):
        assert [mine[k] for k in ("document", "method", "ratio", "stored_bytes")] == [
            theirs[k] for k in ("document", "method", "ratio", "stored_bytes")
        ]
        for a, b in zip(mine["outcomes"], theirs["outcomes"], strict=True):
            assert a == pytest.approx(b, abs=1e-3)
    # A run goes on with any number of processes.
    del two["cells"][3:]
    Path("two.json").write_text(json.dumps(two), encoding="utf-8")
    assert run(capsys, *words, "-o", "two.json", "-j", "3")[0] == 0
    assert len(json.loads(Path("two.json").read_text(encoding="utf-8"))["cells"]) == 8


def test_all_stands_for_every_method() -> None:
    found = makers.expanded("all")
    assert {"omp", "kvzip", "am-omp", "summary"} <= set(found)
    assert not {"keep", "shuffled"} & set(found)
    assert makers.expanded("omp") == ["omp"]


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value / 2, "high": value}


def row(method: str, ratio: float | None, kind: str = "all") -> dict[str, Any]:
    return {
        "method": method,
        "ratio": ratio,
        "kind": kind,
        "stored_bytes": 0 if method == "none" else 1_000_000,
        "real_ratio": None if method == "none" else ratio,
        "recall": None if kind == "text" else estimate(0.5),
        "nll": estimate(1.25),
        "kl": estimate(0.00002),
        "agreement": estimate(1.0),
        "seconds": {"reference": 1.0, "compact": 0.5},
    }


def test_the_table_lines_up() -> None:
    rows = [row("none", None), row("omp", 20.0), row("omp", 20.0, "direct")]
    head, none, omp = table_text(rows).splitlines()
    assert omp.split() == [
        "omp", "20×", "20.0×", "1", "MB", "0.500", "(0.25–0.50)", "0.500", "1.250", "2e-05",
        "1.000", "1.5",
    ]  # fmt: skip
    assert head.index("KL") + 2 == omp.index("2e-05") + 5
    assert "–" in none
    assert "direct" in head


def test_the_live_table_shows_rows_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    class Fake:
        documents = ({"tokens": 100}, {"tokens": 100}, {"tokens": 100})
        questions = (["a"], ["b"])
        cells = ()

        def todo(self, document: int) -> list[Any]:
            return [("omp", 2.0)]

        def row(self, method: str, ratio: float | None, kind: str, resamples: int) -> Any:
            assert resamples == 0
            return row(method, ratio, kind)

    table = LiveTable(Fake())  # type: ignore[arg-type]
    table.document(1, "register 1", 2000)
    table.start("compact", 4)
    table.advance(3)
    for ratio in range(2, 60):
        table.cell(Fake(), "omp", float(ratio))  # type: ignore[arg-type]
    screen = Console(width=120, height=20, record=True, file=StringIO())
    table.screen = screen
    screen.print(table.render())
    text = screen.export_text()
    assert "document 2 of 3: register 1, 2,000 tokens · compact 75%" in text
    assert len(text.splitlines()) <= 20
    assert "59×" in text
    assert "stored" in text
    table.screen = narrow = Console(width=80, height=20, record=True, file=StringIO())
    narrow.print(table.render())
    text = narrow.export_text()
    assert "stored" not in text
    assert "…" not in text
