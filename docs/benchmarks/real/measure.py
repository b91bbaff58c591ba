"""Measures every method on a real model and real documents, with `amkv eval`.

    python docs/benchmarks/real/measure.py MODEL --data FOLDER -o RESULTS [--suite qa] [--jobs 8]

FOLDER holds `qa.jsonl`, `quality.jsonl` and `tpo.jsonl` (real.md says where they come from). A text
for the perplexity is made of the articles. Results are `amkv eval`'s own files, RESULTS/MODEL-SUITE
.json; what is there, or beside this script, is not measured again. Methods come in three groups,
so that what is stopped early has the first one whole. `python docs/benchmarks/real/tables.py` makes
tables of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

OWN = ("omp", "omp-no-bias", "highest-attention", "kvzip", "expected-attention", "snapkv")
PAPER = ("am-highest-attention", "am-omp")
OTHERS = (
    "kvzip-uniform",
    "keydiff",
    "knorm",
    "tova",
    "h2o",
    "pyramidkv",
    "streaming",
    "random",
    "summary",
)
GROUPS = (OWN, (*OWN, "am-highest-attention", *OTHERS), (*OWN, *PAPER, *OTHERS))
RATIOS = "5,10,20,40,100"

SUITES = {
    "qa": ("qa.jsonl", ["--suite", "qa"]),
    "qa-more": ("qa-more.jsonl", ["--suite", "qa"]),
    "quality": ("quality.jsonl", ["--suite", "quality"]),
    "tpo": ("tpo.jsonl", ["--suite", "quality"]),
    "perplexity": (None, ["--suite", "perplexity", "--tokens", "7000", "--docs", "6"]),
}


def published(name: str, model: Path, target: Path, again: Sequence[str] = ()) -> None:
    """Goes on from results beside this script, which know a model by the name of its folder, but
    for the methods to measure `again`."""
    source = Path(__file__).parent / name
    if source.exists() and not target.exists():
        record = json.loads(source.read_text(encoding="utf-8"))
        record["settings"]["model"] = str(model.resolve())
        record["cells"] = [cell for cell in record["cells"] if cell["method"] not in again]
        target.write_text(json.dumps(record), encoding="utf-8")


def measured(target: Path) -> list[str]:
    """The methods that a file of results has; it goes on only with all of these."""
    if not target.exists():
        return []
    record = json.loads(target.read_text(encoding="utf-8"))
    names = [name for name, _ in record["settings"]["methods"]]
    return [name for name in names if name not in ("full", "none")]


def book(data: Path, folder: Path) -> Path:
    """One long text: the articles of QuALITY, one after the other."""
    articles: dict[str, str] = {}
    for line in (data / "quality.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        articles.setdefault(entry["article_id"], entry["article"])
    path = folder / "articles.txt"
    path.write_text("\n\n".join(articles.values()), encoding="utf-8")
    return path


def main() -> None:
    """Runs `amkv eval` once for each group of methods."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--suite", choices=SUITES, default="qa")
    parser.add_argument("--ratio", default=RATIOS)
    parser.add_argument("--groups", type=int, default=len(GROUPS), help="only the first N of 3")
    parser.add_argument("--docs", help="only the first N documents")
    parser.add_argument("--again", default="", help="methods to measure again, by comma")
    parser.add_argument("--without", default="", help="a document of qa to leave out, by its name")
    parser.add_argument("--jobs", default="1")
    parser.add_argument("-o", "--output", type=Path, default=Path())
    args = parser.parse_args()
    name, options = SUITES[args.suite]
    with tempfile.TemporaryDirectory() as folder:
        file = book(args.data, Path(folder)) if name is None else args.data / name
        if args.without:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            file = Path(folder) / file.name
            file.write_text(
                "".join(line for line in lines if json.loads(line)["name"] != args.without),
                encoding="utf-8",
            )
        if args.docs:
            options += ["--docs", args.docs]
        result = f"{args.model.name}-{args.suite}.json"
        again = [method for method in args.again.split(",") if method]
        published(result, args.model, args.output / result, again)
        for group in GROUPS[: args.groups]:
            methods = dict.fromkeys([*group, *measured(args.output / result)])
            command = [
                *("amkv", "eval", str(file), *options, "--model", str(args.model)),
                *("--method", ",".join(methods), "--ratio", args.ratio, "--jobs", args.jobs),
                *("-o", str(args.output / result), "-q"),
            ]
            print(" ".join(command), flush=True)
            subprocess.run([sys.executable, "-m", "amcli", *command[1:]], check=True)


if __name__ == "__main__":
    main()
