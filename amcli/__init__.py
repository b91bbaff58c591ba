"""amkv: compile a document into a compact KV cache, and chat with it.

    context = amcli.load("doc.amkv").attach(model, tokenizer)
    print(context.generate("Who wrote this?"))

Importing this package must stay cheap: nothing here imports torch or transformers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from amcli.system.version import VERSION

if TYPE_CHECKING:
    from amcli.api import Document

__version__ = VERSION

__all__ = ["__version__", "load"]


def load(path: str | os.PathLike[str]) -> Document:
    """Opens an artifact for use with a transformers model; see `amcli.api.Document`.

    Raises UsageError if the file cannot be read, ArtifactError if it is not valid.
    """
    from amcli.api import load as open_document

    return open_document(path)
