"""The Python API: artifacts in somebody else's transformers script; see `docs/python-api.md`.

    context = amcli.load("doc.amkv").attach(model, tokenizer)
    print(context.generate("Who wrote this?"))

Errors are `amcli.errors.AmkvError`: a message, a hint of what to do, and for programs a code and
the name of the argument that is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from amcli.models.adopted import Model, Tokenizer, adopt, release
from amcli.pipeline.contexts import opening
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.talk.session import DEFAULT_MAX_TOKENS, Session
from amcli.storage.artifacts import Artifact


class Document:
    """An artifact on disk, opened and checked; a context manager, and closed with the process.

    path      as it was given
    manifest  what the file says of itself, as `amkv-v1.md` describes it
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
        """The name of the model that the file was made with. A claim of the file's: nothing is
        ever loaded by it."""
        return str(self.manifest["model"]["id"])

    def close(self) -> None:
        """Closes the file; contexts that were attached go on."""
        self._artifact.__exit__()

    def attach(self, model: Model, tokenizer: Tokenizer | None = None) -> Attached:
        """The context in the cache of `model`, which gets amkv's attention.

        tokenizer  the model's; None: loaded from where the model came from

        The model answers other calls as before, and has its own attention back after
        `Attached.detach`. Raises ModelMismatchError (`wrong-model`) for a model that the file was
        not made with, saying what differs, and UsageError (`model-unsupported`) for one that cannot
        take a compact cache.
        """
        loaded = adopt(model, tokenizer)
        try:
            return Attached(opening.restore(self._artifact, loaded))
        except BaseException:
            release(model)
            raise


class Attached:
    """A context in the cache of a model; questions are asked one by one and change nothing in it.

    context  what the rest of the package works with
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
        """The answer to a question, which is asked right after the document.

        max_tokens   longest answer
        temperature  0: the likeliest token every time

        Raises UsageError for an empty question or one that the model has no positions for.
        """
        return "".join(self.stream(question, max_tokens, temperature, seed)).strip()

    def stream(
        self,
        question: str,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The pieces of the answer as they come; like `generate` otherwise."""
        return self.chat(max_tokens, temperature, seed).ask(question)

    def chat(
        self, max_tokens: int = DEFAULT_MAX_TOKENS, temperature: float = 0.0, seed: int = 0
    ) -> Session:
        """A conversation: each `ask(question)` streams an answer and sees the turns before it."""
        return Session(self.context, max_tokens=max_tokens, temperature=temperature, seed=seed)

    def inputs(self, question: str) -> dict[str, Any]:
        """What `model.generate(**inputs, …)` takes, for its own ways of sampling.

        `input_ids [1, T + n]` with the document's ids in front, `attention_mask` of the same
        shape, and `past_key_values`, a cache of this one call; only the last `n` tokens are read.
        """
        chat = self.context.loaded.chat
        closed = self.context.boundary == "turn_closed"
        prompt = chat.next_turn(question) if closed else chat.first_turn(question)
        ids = torch.tensor([self.ids + prompt], device=self.context.loaded.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "past_key_values": self.context.cache.fork(),
        }

    def detach(self) -> None:
        """Gives the model its own attention back; the context cannot be asked after that."""
        release(self.context.loaded.model)


def load(path: str | os.PathLike[str]) -> Document:
    """Opens an artifact; its header and manifest are checked, keys and values are not read.

    Raises UsageError when the file is not there (its code: `file-missing`) or cannot be read,
    ArtifactError when it is no artifact (`not-an-artifact`) or no valid one (`artifact-invalid`).
    """
    return Document(path)
