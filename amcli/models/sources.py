"""What a model's name stands for: pocket, a folder, a GGUF file, or a repository of the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.hub import cached_file, extract_commit_hash

from amcli.errors import UsageError
from amcli.models import gguf
from amcli.models.catalogue import POCKET
from amcli.models.gguf import GgufModel

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


@dataclass(frozen=True)
class ModelSource:
    """Where to load from (`location`), and the name to remember it by (`id`).

    The location of a GGUF model is its file and, once that is open as `gguf`, a folder around it.
    """

    id: str
    location: str
    revision: str | None
    is_gguf: bool = False
    gguf: GgufModel | None = None

    def commit(self) -> str | None:
        """The commit of a hub model that its revision stands for; None for any other model."""
        return commit_of(self.location, self.revision)

    @classmethod
    def of(cls, spec: str) -> ModelSource:
        """Where the model that `spec` names is. Raises UsageError for what is not a model."""
        if not spec:
            raise UsageError(
                "no model named",
                "name one, such as Qwen/Qwen3-4B",
                code="model-unnamed",
                field="model",
            )
        if spec == POCKET:
            from amcli.pocket import folder

            _check_folder(folder())
            return cls(POCKET, str(folder()), None)
        path = Path(spec).expanduser()
        if gguf.named(path):
            # Links are not resolved: parts lie side by side here, but perhaps not at the target.
            return cls(os.path.abspath(path), str(path), None, is_gguf=True)
        if path.exists() or spec.startswith((".", "/", "~", "\\")) or spec.count("/") > 1:
            _check_folder(path)
            return cls(str(path.resolve()), str(path), None)
        name, _, revision = spec.partition("@")
        return cls(name, name, revision or None)


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub model stands for: of the cache where there is no network,
    else of the hub; None where a model is no hub model.

    The hub's library names the folder of a file after it. transformers does not always say it.
    """
    if Path(name).exists():
        return None
    return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise UsageError(
            f"model folder {path} does not exist",
            "check the path",
            code="model-missing",
            field="model",
            path=path,
        )
    if not path.is_dir():
        raise UsageError(
            f"{path} is a file, not a model folder",
            "give the folder that holds config.json, or a GGUF file",
            code="model-not-a-folder",
            field="model",
            path=path,
        )
    files = sorted(path.glob(f"*{gguf.ENDING}"))
    if files and not (path / "config.json").is_file():
        raise UsageError(
            f"model folder {path} has no config.json, but GGUF files",
            f"name the file: {files[0]}",
            code="model-is-gguf",
            field="model",
            path=path,
            file=files[0],
        )
    if not (path / "config.json").is_file():
        raise UsageError(
            f"model folder {path} has no config.json",
            "give a folder in Hugging Face format",
            code="model-incomplete",
            field="model",
            path=path,
        )
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(
            f"model folder {path} has no tokenizer",
            "put the model's tokenizer.json into it",
            code="model-incomplete",
            field="model",
            path=path,
        )
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHT_PATTERNS):
        raise UsageError(
            f"model folder {path} has no weights",
            "put the model's *.safetensors files into it",
            code="model-incomplete",
            field="model",
            path=path,
        )
