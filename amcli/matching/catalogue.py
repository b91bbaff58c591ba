"""The methods and the budgets by name, for help, completion and documentation.

Imports nothing, torch least of all. `methods` loads a method from the place named here when it is
first asked for; `plugins` finds those of other packages.
"""

from __future__ import annotations

from typing import NamedTuple


class Listed(NamedTuple):
    """A method of the catalogue.

    place    where its `Method` is, `module:NAME` below `amcli.matching`
    summary  what it does, in a line
    brief    what the help says beside its name, if the name does not say enough
    """

    place: str
    summary: str
    brief: str = ""


OWN: dict[str, Listed] = {
    "omp": Listed(
        "recipes:OMP",
        "best keys, pursuit where few are kept, exact biases, shrunk values",
    ),
    "omp-no-bias": Listed(
        "recipes:OMP_NO_BIAS",
        "the same without biases, which keep each head's attention mass",
    ),
    "highest-attention": Listed(
        "recipes:HIGHEST_ATTENTION",
        "the most attended keys, shrunk values",
        brief="no pursuit, no biases",
    ),
    "keep": Listed(
        "recipes:KEEP",
        "every key and value as it is: the full cache in a file",
        brief="everything",
    ),
}
"""The tool's own methods."""

RIVALS: dict[str, Listed] = {
    "streaming": Listed(
        "baselines.streaming:STREAMING",
        "StreamingLLM: 4 sinks and the most recent keys",
    ),
    "random": Listed(
        "baselines.random_keys:RANDOM",
        "random keys, seeded",
    ),
    "knorm": Listed(
        "baselines.knorm:KNORM",
        "keys of smallest norm",
    ),
    "keydiff": Listed(
        "baselines.keydiff:KEYDIFF",
        "keys least like the mean key",
    ),
    "snapkv": Listed(
        "baselines.snapkv:SNAPKV",
        "SnapKV: what the last 64 queries attend to, and their own keys",
    ),
    "tova": Listed(
        "baselines.tova:TOVA",
        "TOVA: what the last query attends to, over all heads",
    ),
    "h2o": Listed(
        "baselines.h2o:H2O",
        "H2O: largest attention mass in the prefill, and recent keys",
    ),
    "expected-attention": Listed(
        "baselines.expected_attention:EXPECTED_ATTENTION",
        "Expected Attention: what Gaussian queries to come would pay",
    ),
    "pyramidkv": Listed(
        "baselines.pyramidkv:PYRAMIDKV",
        "SnapKV with fewer entries in higher layers",
    ),
    "kvzip": Listed(
        "baselines.kvzip:KVZIP",
        "KVzip: largest attention while repeating, one budget for all heads",
    ),
    "kvzip-uniform": Listed(
        "baselines.kvzip:KVZIP_UNIFORM",
        "KVzip with the same budget a head",
    ),
    "am-highest-attention": Listed(
        "baselines.am_highest_attention:AM_HIGHEST_ATTENTION",
        "Attention Matching with the most attended keys, as its paper has it",
    ),
    "am-omp": Listed(
        "baselines.am_omp:AM_OMP",
        "Attention Matching with matching pursuit on masses, as its paper has it",
    ),
}
"""Other people's methods to compare with: without queries, with the context's own, with more."""

METHODS: dict[str, Listed] = {**OWN, **RIVALS}
"""All methods that come with the tool, in listing order."""

DEFAULT = "omp"
"""The default method."""

BUDGETS: dict[str, str] = {
    "adaptive": "a small floor for every head, the rest by score over all layers and heads",
    "uniform": "every head the same",
    "global": "by score over all layers and heads, 4 entries a head at least",
    "adakv": "layers the same, heads of a layer by score",
    "pyramid": "heads of a layer the same, lower layers more",
}
"""Ways for heads to share the entries; `budgets` implements them."""
