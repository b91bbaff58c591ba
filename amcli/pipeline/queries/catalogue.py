"""The sources of reference queries by name, for help, completion and documentation.

Imports nothing, torch least of all; `passages` has what makes the queries.
"""

from __future__ import annotations

SOURCES: dict[str, str] = {
    "repeat": "the document, said again",
    "quotes": "its sentences, as answers to questions about their own words",
    "self-study": "questions that the model asks itself",
    "repeat-parts": "said again in parts that count for their own keys: faster",
    "context": "the document's own",
}
"""Where reference queries come from, in the order in which they are listed."""

DEFAULT = "repeat+quotes"
"""The sources of the tool's own methods."""

MIXTURE = "repeat+quotes+self-study"
"""The mixture that help and hints show."""
