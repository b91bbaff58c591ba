"""Error messages in command-line terms, by error code.

Errors raised below the commands speak of arguments of the Python API. Where the user would type
something else, the wording is here: templates that `str.format` fills with the error's facts, or
functions of them where one sentence is not enough. None: the error's own words will do.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from amcli.errors import AmkvError

Text = str | Callable[..., str]


class Words(NamedTuple):
    """What the command line says about an error; None: the error's own words."""

    message: Text | None = None
    hint: Text | None = None


def _less_memory(dtype: str, device: str, **_: object) -> str:
    """What to try if a model's weights do not fit."""
    smaller = "--dtype bfloat16, " if dtype == "float32" else ""
    other = "a machine with more memory" if device == "cpu" else "--device cpu"
    return f"try {smaller}a smaller model, or {other}"


def _new_place(now: object, **_: object) -> str:
    """Where a model may be that has been moved."""
    return f"say where it is now, with --model {shlex.quote(str(now or 'FOLDER'))}"


def _other_model(wanted: str, model: str, changed: bool, **_: object) -> str:
    """What to do about a model that a file was not made with."""
    if changed:
        return (
            "its files have changed since: put back those of before, or read the document again "
            f"with: amkv compact DOC --model {shlex.quote(model)}"
        )
    return f"use --model {shlex.quote(wanted)}, or compact the document again for this model"


_AGAIN = "make one with: amkv compact DOC --save-budget FILE"
_FOLDER = "give --model a folder"
_LONGER = "choose a model with a longer context with --model"
_ORIGINAL = "give --model the folder or hub id that the file was made from"
_OTHER_METHOD = "choose another --method, such as omp"
_SPREAD = "start one process, with --device-map auto for several GPUs"
_SUITE_FILE = "name it: amkv eval FILE --suite {suite}"

WORDS: dict[str, Words] = {
    # models
    "document-too-long": Words(hint=f"shorten the document, or {_LONGER}"),
    "device-per-process": Words(hint="leave --device out"),
    "gguf-incomplete": Words(hint=_ORIGINAL),
    "gguf-package-too-old": Words(hint=f"pip install --upgrade gguf, or {_ORIGINAL}"),
    "gguf-tokenizer-unreadable": Words(hint=f"pip install --upgrade transformers, or {_ORIGINAL}"),
    "gguf-unreadable": Words(hint=_ORIGINAL),
    "gpu-missing": Words(hint="use --device cpu, or see whether nvidia-smi lists the GPU"),
    "gpu-not-supported": Words(
        hint="use --device cpu, or install PyTorch with CUDA: https://pytorch.org"
    ),
    "hub-failed": Words(hint=f"try again in a while, or {_FOLDER}"),
    "hub-unreachable": Words(hint=f"check the network, or {_FOLDER}"),
    "model-brings-code": Words(
        hint="choose a model that transformers supports itself, or read that code and add "
        "--trust-remote-code"
    ),
    "model-is-gguf": Words(hint="name the file: --model {file}"),
    "model-missing": Words(hint="check the path given to --model"),
    "model-moved": Words(hint=_new_place),
    "model-not-divisible": Words(hint=_SPREAD),
    "model-not-loadable": Words(hint="run again with --debug"),
    "model-out-of-memory": Words(hint="try --dtype bfloat16, --device cpu, or a smaller model"),
    "model-too-large": Words(hint=_less_memory),
    "model-unnamed": Words(hint="name one with --model, such as Qwen/Qwen3-4B"),
    "out-of-memory": Words(hint="try a shorter document, --dtype bfloat16, or --device cpu"),
    "rope-changes-with-length": Words(hint=_OTHER_METHOD),
    "rope-unknown": Words(hint=_OTHER_METHOD),
    "unknown-gpu": Words(hint="use --device cuda:0"),
    "unknown-revision": Words(hint="leave it out: --model {model}"),
    # contexts, and queries about them
    "empty-question": Words(hint="type a question"),
    "keys-of-another-length": Words(hint="save the conversation as text: /save chat.md"),
    "no-self-study": Words(hint="use --queries repeat+quotes"),
    "numbers-not-finite": Words(hint="prefill the document again with --dtype bfloat16 or float32"),
    "template-missing": Words(hint="use --queries repeat+quotes, or an instruction-tuned model"),
    "wrong-model": Words(hint=_other_model),
    # compaction
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
        "--store {store} wants {wanted}, {model} has {dim}", "use --store auto"
    ),
    "not-storable": Words(hint="use --store native"),
    "fidelity-no-share": Words(
        "--fidelity {fidelity:g} is not a share: above 0, and at most 1",
        "for example --fidelity 0.98",
    ),
    "nothing-to-search": Words(hint="leave --fidelity out, or choose another method"),
    "nothing-to-quote": Words(hint="give a --ratio"),
    "nothing-to-lose": Words(hint="give a --ratio, or another --model"),
    "no-room-to-measure": Words(hint="shorten the document, or give a --ratio"),
    "fidelity-not-reached": Words(
        hint="ask for less, such as --fidelity {less:g}, or keep everything with --method keep"
    ),
    "no-agreement": Words(hint="keep everything with --method keep"),
    "budget-broken": Words(hint=_AGAIN),
    "budget-of-another-model": Words(
        hint="save one with this model: amkv compact DOC --model {model} --save-budget FILE"
    ),
    "not-a-budget": Words(hint=_AGAIN),
    "ratio-leaves-nothing": Words(hint="use a smaller --ratio"),
    # files, the last prefill, settings
    "artifact-invalid": Words(hint="make it again with amkv prefill or amkv compact"),
    "disk-full": Words(hint="free some space, or choose another disk with -o"),
    "file-exists": Words(hint="add --force to replace it, or name another file with -o"),
    "folder-exists": Words(hint="name a new folder with -o"),
    "folder-missing": Words(hint="make it, or choose another with -o"),
    "no-prefill": Words(hint="name a document, or prefill one first: amkv prefill doc.txt"),
    "not-an-artifact": Words(hint="make one from a text with: amkv compact {path}"),
    "not-writable": Words(hint="choose another place with -o"),
    "setting-only-typed": Words("{path}: {name} cannot be set, only typed: --{name}"),
    # conversions
    "cache-of-another-length": Words(
        hint="give the document, or with --ids the tokens, that the cache was made from"
    ),
    "cache-of-another-text": Words(
        hint="give the model and the document, or with --ids the tokens, that the cache was made "
        "from"
    ),
    "cache-without-states": Words(hint="prefill the document with amkv prefill"),
    # evaluation
    "not-results": Words(
        "{path} already exists and is not a result of amkv eval",
        "name another file with -o, or replace it with --force",
    ),
    "plot-package-missing": Words("--plot needs matplotlib"),
    "process-ended": Words(hint="it may have run out of memory: try fewer --jobs"),
    "results-of-other-settings": Words(
        hint="name another file with -o, or start over with --force"
    ),
    "stdin-not-taken": Words("amkv eval reads files, not standard input"),
    "suite-of-whole-documents": Words(hint="leave --tokens out"),
    "suite-wants-documents": Words(
        "suite {suite} wants a file: JSON lines of documents and questions, or a document with "
        "--questions FILE",
        _SUITE_FILE,
    ),
    "suite-wants-file": Words(hint=_SUITE_FILE),
    "suite-without-choice": Words(hint="leave --reason out"),
    "suite-without-own-questions": Words(
        hint="--suite qa, or a number for --questions instead of {asked}"
    ),
    "tokens-too-few": Words(hint="raise --tokens"),
    "tokens-too-many": Words(hint=f"lower --tokens, or {_LONGER}"),
    "words-too-many": Words(hint="use --tokens 1024"),
}

Error = TypeVar("Error", bound=AmkvError)


def spoken(error: Error) -> Error:
    """The error in command-line terms, with the same class, code, field, place and facts."""
    words = WORDS.get(error.code or "")
    if words is None:
        return error
    return error.worded(_filled(words.message, error), _filled(words.hint, error))


def _filled(text: Text | None, error: AmkvError) -> str | None:
    if text is None or isinstance(text, str):
        return text and text.format(**error.facts)
    return text(**error.facts)
