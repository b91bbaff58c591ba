"""Errors in the words of the command line, by their code.

Below the commands an error speaks of arguments, as the Python API has them. Where what one would
type is called something else, it stands here: templates that `str.format` fills with the facts of
the error. None: the error's own words serve.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from amcli.errors import AmkvError


class Words(NamedTuple):
    """What the command line says of an error; None: what the error says."""

    message: str | None = None
    hint: str | None = None


WORDS: dict[str, Words] = {
    # pipeline/compaction
    "sizes-exclude": Words("--{one} and --{other} exclude each other"),
    "ratio-below-1": Words("--ratio {ratio:g} is below 1"),
    "tokens-below-1": Words("--tokens {tokens} is below 1"),
    "ratio-above-length": Words(
        "--ratio {ratio:g} is more than the context has tokens ({length:,})"
    ),
    "tokens-above-length": Words("--tokens {tokens:,} is more than the context has ({length:,})"),
    "method-keeps-all": Words(hint="leave --ratio out, or use --ratio 1"),
    "unknown-budget": Words(hint="budgets: {known}, or a file that --save-budget wrote"),
    "queries-of-method": Words(hint="leave --queries out"),
    "store-wants-even": Words(
        "--store {store} wants {wanted}, {model} has {dim}", "use --store int8"
    ),
    "fidelity-no-share": Words(
        "--fidelity {fidelity:g} is not a share: above 0, and at most 1",
        "for example --fidelity 0.99",
    ),
    "nothing-to-search": Words(hint="leave --fidelity out, or choose another method"),
    "no-room-to-measure": Words(hint="shorten the document, or give a --ratio"),
    "fidelity-not-reached": Words(
        hint="ask for less, such as --fidelity {less:g}, or keep everything with --method keep"
    ),
    "no-agreement": Words(hint="keep everything with --method keep"),
}

Error = TypeVar("Error", bound=AmkvError)


def spoken(error: Error) -> Error:
    """The error as the command line puts it: of the same class, code, field and facts."""
    words = WORDS.get(error.code or "")
    if words is None:
        return error
    message, hint = error.message, error.hint
    if words.message is not None:
        message = words.message.format(**error.facts)
    if words.hint is not None:
        hint = words.hint.format(**error.facts)
    return type(error)(message, hint, code=error.code, field=error.field, **error.facts)
