"""The Python API: artifacts in your own transformers scripts; see `docs/python-api.md`.

    context = amcli.load("doc.amkv").attach(model, tokenizer)
    print(context.generate("Who wrote this?"))

Errors are `amcli.errors.AmkvError`: a message, a hint on what to do and, for programs, a code and
the name of the wrong argument.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from amcli.models.adopted import Model, Tokenizer, adopt, release
from amcli.models.calling import GENERATE
from amcli.pipeline.contexts import opening
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.talk.session import DEFAULT_MAX_TOKENS, Session
from amcli.storage.artifacts import Artifact


class Document:
    """An artifact on disk, opened and checked; a context manager, closed at exit at the latest.

    path      the path as given
    manifest  the file's manifest; `amkv-v1.md` describes it
    kind      `prefill` or `compact`
    tokens    logical length: tokens of the context as the model saw them
    ratio     full KV bytes over stored bytes
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._artifact = Artifact.open(path)
        self.path = Path(path)
        self.manifest: dict[str, Any] = self._artifact.manifest
        self.kind = self._artifact.kind
        self.tokens = self._artifact.logical_length
        self.ratio = self._artifact.ratio

    def __enter__(self) -> Document:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.kind} of {self.tokens:,} tokens, {self.ratio:.1f}x: {self.path}>"

    @property
    def model(self) -> str:
        """The name of the model that the file says it was made with. Just a claim: nothing is ever
        loaded by this name."""
        return str(self.manifest["model"]["id"])

    def close(self) -> None:
        """Closes the file; attached contexts keep working."""
        self._artifact.__exit__()

    def attach(self, model: Model, tokenizer: Tokenizer | None = None) -> Attached:
        """The context in a cache of `model`, which gets amkv's attention.

        tokenizer  the model's own; None: loaded from where the model came from

        The model answers other calls as before, and gets its own attention back with
        `Attached.detach`. Raises ModelMismatchError (`wrong-model`), saying what differs, for a
        model that the file was not made with, and UsageError (`model-unsupported`) for one that
        cannot use a compact cache.
        """
        loaded = adopt(model, tokenizer)
        try:
            return Attached(opening.restore(self._artifact, loaded))
        except BaseException:
            release(model)
            raise


class Attached:
    """A context in a model's cache; questions are asked one by one and do not change it.

    context  the `Context` that the rest of the package works with
    ids      `T` token ids of the context
    """

    def __init__(self, context: Context):
        self.context = context
        self.ids = list(context.ids)

    def generate(
        self,
        question: str,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The answer to a question asked right after the document.

        max_tokens   longest answer
        temperature  0: the likeliest token every time

        Raises UsageError for an empty question or one too long for the model's positions.
        """
        return "".join(self.stream(question, max_tokens, temperature, seed)).strip()

    def stream(
        self,
        question: str,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The pieces of the answer as they come; otherwise like `generate`."""
        return self.chat(max_tokens, temperature, seed).ask(question)

    def chat(
        self, max_tokens: int = DEFAULT_MAX_TOKENS, temperature: float = 0.0, seed: int = 0
    ) -> Session:
        """A conversation: each `ask(question)` streams an answer and sees the turns before it."""
        return Session(self.context, max_tokens=max_tokens, temperature=temperature, seed=seed)

    def inputs(self, question: str) -> dict[str, Any]:
        """Inputs for `model.generate(**inputs, …)`, to use its own ways of sampling.

        `input_ids [1, T + n]` with the document's ids in front, `attention_mask` of the same
        shape, and a cache for this one call, by the name that the installed transformers gives it;
        only the last `n` tokens are read.
        """
        chat = self.context.loaded.chat
        closed = self.context.boundary == "turn_closed"
        prompt = chat.next_turn(question) if closed else chat.first_turn(question)
        ids = torch.tensor([self.ids + prompt], device=self.context.loaded.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            GENERATE: self.context.cache.fork(),
        }

    def detach(self) -> None:
        """Gives the model its own attention back; the context cannot be used after that."""
        release(self.context.loaded.model)


def load(path: str | os.PathLike[str]) -> Document:
    """Opens an artifact; checks its header and manifest, without reading keys and values.

    Raises UsageError if the file does not exist (code `file-missing`) or cannot be read,
    ArtifactError if it is not an artifact (`not-an-artifact`) or not valid (`artifact-invalid`).
    """
    return Document(path)
