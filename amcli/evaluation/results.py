"""The results file of a run: settings, cells as they are finished, rows at the end.

A cell is one method at one ratio on one document. The whole file is replaced after each cell, so a
stopped run resumes where it was. Everything except `seconds`, `prefills` and `date` is a function
of the settings: two runs on the same hardware and versions differ in nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from amcli.errors import UsageError
from amcli.evaluation.makers import FULL, NONE
from amcli.evaluation.metrics import METRICS, RESAMPLES, Record, estimates
from amcli.system.files import input_errors, write_json

VERSION = 1

Key = tuple[int, str, float | None]
"""Document, method, ratio asked for (None for the anchors)."""


def today() -> str:
    """The date in UTC, `YYYY-MM-DD`."""
    return datetime.now(UTC).date().isoformat()


@dataclass
class Results:
    """The results of a run so far.

    settings   everything the numbers depend on; `methods` and `ratios` may grow from run to run
    documents  for each document its name, tokens, hash of the text, and seconds of prefill
    questions  for each document the kind of each question
    date       when the run was first started; a resumed run keeps it
    """

    settings: dict[str, Any]
    hardware: str
    tools: dict[str, str]
    documents: list[dict[str, Any]]
    questions: list[list[str]]
    cells: dict[Key, dict[str, Any]] = field(default_factory=dict)
    date: str = field(default_factory=today)
    _rows: tuple[int, list[dict[str, Any]]] = field(default=(0, []), init=False)

    def order(self) -> list[tuple[str, float | None]]:
        """Method and ratio of all rows, anchors first."""
        pairs = [(name, ratio) for name, ratios in self.settings["methods"] for ratio in ratios]
        return [(FULL, None), (NONE, None), *pairs]

    def todo(self, document: int) -> list[tuple[str, float | None]]:
        """Cells of a document still to be measured, in order."""
        return [pair for pair in self.order() if (document, *pair) not in self.cells]

    @property
    def complete(self) -> bool:
        """Whether every cell has been measured."""
        return not any(self.todo(i) for i in range(len(self.documents)))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each method, ratio and kind of question; `all` first."""
        if self._rows[0] != len(self.cells):  # intervals take a while: compute them once
            self._rows = len(self.cells), self._all_rows()
        return self._rows[1]

    def _all_rows(self) -> list[dict[str, Any]]:
        kinds = list(dict.fromkeys(kind for kinds in self.questions for kind in kinds))
        found = []
        for method, ratio in self.order():
            for kind in ["all", *kinds] if len(kinds) > 1 else ["all"]:
                row = self.row(method, ratio, kind)
                if row is not None:
                    found.append(row)
        return found

    def row(
        self, method: str, ratio: float | None, kind: str, resamples: int = RESAMPLES
    ) -> dict[str, Any] | None:
        """The row of one method, ratio and kind over the existing cells; None if there are none."""
        groups: list[list[Record]] = []
        cells = []
        prefills = []
        for document, kinds in enumerate(self.questions):
            cell = self.cells.get((document, method, ratio))
            if cell is None:
                continue
            cells.append(cell)
            prefills.append(self.documents[document]["seconds"])
            records = _records(cell, self.cells.get((document, NONE, None)))
            groups.append([r for k, r in zip(kinds, records, strict=True) if kind in ("all", k)])
        if not cells or not any(groups):
            return None
        found = estimates(groups, self.settings["seed"], resamples)
        stored = sum(cell["stored_bytes"] for cell in cells)
        full = sum(cell["full_bytes"] for cell in cells)
        return {
            "method": method,
            "ratio": ratio,
            "kind": kind,
            "budget": cells[0]["budget"],
            "documents": sum(bool(group) for group in groups),
            "questions": sum(len(group) for group in groups),
            "stored_bytes": round(stored / len(cells)),
            "real_ratio": round(full / stored, 4) if stored else None,
            **{name: finite(e.record()) if (e := found[name]) else None for name in METRICS},
            "output_error": _output_error(cells),
            "prefills": _prefills(cells, prefills),
            "seconds": _means(prefills) | _means([cell["seconds"] for cell in cells]),
        }

    # ---- the file ------------------------------------------------------------------------------

    def record(self, cells: bool = True) -> dict[str, Any]:
        """The run as JSON; without its cells for a summary."""
        complete = self.complete
        found = {
            "amkv_eval": VERSION,
            "complete": complete,
            "date": self.date,
            "settings": self.settings,
            "hardware": self.hardware,
            "tools": self.tools,
            "documents": self.documents,
            "rows": self.rows() if complete else [],
        }
        if cells:
            found["questions"] = self.questions
            found["cells"] = [
                self.cells[document, *pair]
                for document in range(len(self.documents))
                for pair in self.order()
                if (document, *pair) in self.cells
            ]
        return found

    def write(self, path: Path) -> None:
        """Replaces the file, whole or not at all."""
        write_json(path, self.record(), overwrite=True)

    def resume(self, path: Path) -> None:
        """Takes over the cells of a file, if there is one.

        Raises UsageError when the file is not a results file, or was made with other settings.
        """
        found = _read(path)
        if found is None:
            return
        differing = _differences(self.settings, found["settings"])
        if not differing and _made_of(found) != _made_of(vars(self)):
            differing = ["the documents and questions"]
        if differing:
            raise UsageError(
                f"{path} was made with other settings: {'; '.join(differing)}",
                "name another file, or remove this one to start over",
                code="results-of-other-settings",
                field="path",
                path=path,
                differs=differing,
            )
        for cell in found["cells"]:
            self.cells[cell["document"], cell["method"], cell["ratio"]] = cell
        for mine, theirs in zip(self.documents, found["documents"], strict=True):
            mine["seconds"] = theirs["seconds"]
        self.date = found.get("date", self.date)


def plural(count: int, noun: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def finite(value: Any) -> Any:
    """The same for JSON, which has no NaN or infinity: null for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    """A number from a file, where null stands for one that is not finite."""
    return math.nan if value is None else value


def _records(cell: Mapping[str, Any], none: Mapping[str, Any] | None) -> list[Record]:
    """For each question of a cell, what `metrics` adds up, with the loss of having no context."""
    found: list[Record] = []
    for q, (score, nll, kl, agree, tokens) in enumerate(cell["outcomes"]):
        record = {"nll": _number(nll), "kl": _number(kl), "agree": agree, "tokens": tokens}
        if score is not None:
            record["score"] = score
        if none is not None:
            record["none_kl"] = _number(none["outcomes"][q][2])
        if "own" in cell:
            same, nll, kl, agree, tokens = cell["own"][q]
            record |= {"own_same": same, "own_nll": _number(nll), "own_kl": _number(kl)}
            record |= {"own_agree": agree, "own_tokens": tokens}
            record["f1"], record["contains"] = cell["said"][q]
            if none is not None:
                record["own_none_kl"] = _number(none["own"][q][2])
        found.append(record)
    return found


def _output_error(cells: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over documents of the receipt's output error; None if any is unknown."""
    errors = [cell.get("output_error") for cell in cells]
    known = [error for error in errors if error is not None]
    return round(sum(known) / len(known), 6) if known and len(known) == len(errors) else None


def _prefills(
    cells: Sequence[Mapping[str, Any]], prefills: Sequence[Mapping[str, float]]
) -> float | None:
    """Seconds to make the contexts, over seconds to prefill their documents."""
    spent = sum(s for cell in cells for name, s in cell["seconds"].items() if name != "questions")
    reading = sum(seconds.get("prefill", 0.0) for seconds in prefills)
    return round(spent / reading, 3) if spent and reading else None


def _made_of(record: Mapping[str, Any]) -> Any:
    """What must match for a run to resume: its documents and their questions."""
    return [d.get("sha256") for d in record["documents"]], record["questions"]


def _means(seconds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each stage over all documents."""
    names = dict.fromkeys(name for stages in seconds for name in stages)
    return {n: round(sum(s.get(n, 0.0) for s in seconds) / len(seconds), 3) for n in names}


def _read(path: Path) -> dict[str, Any] | None:
    with input_errors(path):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
    if not isinstance(found, dict) or found.get("amkv_eval") != VERSION:
        raise UsageError(
            f"{path} already exists and is not the result of an evaluation",
            "name another file, or remove this one",
            code="not-results",
            field="path",
            path=path,
        )
    return found


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Differing settings that keep a file from being resumed, each with both values."""
    found = []
    for name in dict.fromkeys([*mine, *theirs]):
        if name == "methods":
            asked = {(method, r) for method, ratios in mine[name] for r in ratios}
            there = {(method, r) for method, ratios in theirs[name] for r in ratios}
            found += [f"it has {m} at {r:g}×" for m, r in sorted(there - asked)]
        elif mine.get(name) != theirs.get(name):
            found.append(f"{name} {_shown(theirs.get(name))} there, {_shown(mine.get(name))} here")
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
