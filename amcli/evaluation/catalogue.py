"""The suites by name, and what else is measured like a method; for help, completion, documentation.

Imports nothing heavy; `suites.base` loads a suite from the place named here when asked for.
"""

from __future__ import annotations

from typing import NamedTuple

from amcli.matching.catalogue import DEFAULT


class Listed(NamedTuple):
    """A suite of the catalogue.

    place    where its `Suite` is, `module:NAME` below `amcli.evaluation.suites`
    summary  what it asks about, in a line
    file     what the FILE argument has to be; None for a suite that takes none
    brief    what the help says beside its name, if the name does not say enough
    """

    place: str
    summary: str
    file: str | None = None
    brief: str = ""


SUITES: dict[str, Listed] = {
    "qa": Listed(
        "qa:QA",
        "documents and questions of your own",
        file="JSON lines of documents and questions, or a document with a file of questions",
        brief="your own",
    ),
    "register": Listed(
        "register:REGISTER",
        "pocket's registers: direct, reverse and two-hop questions",
    ),
    "register-sparse": Listed(
        "register:SPARSE_REGISTER",
        "the same with filler: one fact in about 40 tokens",
    ),
    "needle": Listed(
        "needle:NEEDLE",
        "one fact in long filler, at 10 depths",
    ),
    "ruler": Listed(
        "ruler:RULER",
        "needles, variable tracking and common words after RULER",
    ),
    "quality": Listed(
        "choice:QUALITY",
        "QuALITY: long articles, multiple choice",
        file="QuALITY.v1.0.1.htmlstripped.dev",
    ),
    "longhealth": Listed(
        "choice:LONGHEALTH",
        "LongHealth: five patients' records, multiple choice",
        file="benchmark_v5.json",
    ),
    "perplexity": Listed(
        "perplexity:PERPLEXITY",
        "the second half of a text given the first",
        file="a text file",
    ),
}
"""All suites, in listing order."""

DEFAULT_SUITE, DEFAULT_ASKED = "register", "qa"
"""The default suite: without a file of questions, and with one."""

COMPARED = (DEFAULT, "highest-attention")
"""The methods measured by default."""

SPECIAL: dict[str, str] = {
    "summary": "the model's own",
    "shuffled": "a control that has to fail",
}
"""What is measured like a method but is not one; `makers` implements them."""

ALL = "all"
"""Stands for every method that drops something, and the model's own summary."""
