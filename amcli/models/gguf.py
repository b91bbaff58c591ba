"""Models in GGUF files: what a file holds, joining its parts, and what is wrong, in one line.

transformers reads the tensors, the configuration and the tokenizer. It is given a folder that
holds only the file, so that no neighbouring file influences which model it is. It cannot read
files in parts (`model-00001-of-00003.gguf`): these are joined in a temporary folder, first just
the header, which is all that configuration, tokenizer and memory estimate need, then the tensors,
copied from file to file.
"""

from __future__ import annotations

import errno
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version
from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

from amcli.errors import AmkvError, OutOfMemoryError, UsageError
from amcli.models.ggufheader import MAGIC, Header, Tensor, integer, read_header

ENDING = ".gguf"

TEMPLATE = "tokenizer.chat_template"
TOKENS = "tokenizer.ggml.tokens"

_NAME = "model" + ENDING
_PART = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_ROPE_FACTORS = ("rope_freqs", "rope_factors")
_COPIED_AT_ONCE = 1 << 24

_OTHER_FORM = "give the folder or hub id that the file was made from"


def named(path: Path) -> bool:
    """Whether a path names a GGUF file, by its suffix or its first bytes."""
    if path.is_dir():
        return False
    if path.name.lower().endswith(ENDING):
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


@dataclass(frozen=True)
class GgufModel:
    """A GGUF model of one or several files, in a folder that holds it as one file.

    path    as the user named it
    folder  where transformers finds it, under `file`
    parts   the files, each with its header; the first one's metadata is the model's
    """

    path: Path
    folder: Path
    parts: tuple[tuple[Path, Header], ...]
    file: str = _NAME

    @property
    def metadata(self) -> dict[str, Any]:
        """All that the file says of the model; arrays other than the tokens are left out."""
        return self.parts[0][1].metadata

    @property
    def architecture(self) -> str:
        """llama.cpp's name for it."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of all parts, in order."""
        return [tensor for _, header in self.parts for tensor in header.tensors]

    @property
    def numbers(self) -> int:
        """How many numbers its tensors hold, however they are packed."""
        return sum(math.prod(tensor.dims) for tensor in self.tensors)

    def notes(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """What a user should know about a model that works all the same."""
        found = []
        if not self.metadata.get(TEMPLATE):
            found.append(
                f"warning: {self.path.name} has no chat template, so documents and questions are "
                "read as plain text; if it is made for chats, take a file with "
                "tokenizer.chat_template, or the folder or hub id that it was made from"
            )
        if self._scales_rope and not _scaled(config):
            found.append(
                f"warning: {self.path.name} scales its RoPE for long texts, which transformers "
                "does not read from GGUF files, so it answers worse than it could; take the "
                "folder or hub id that it was made from"
            )
        return tuple(found)

    @property
    def _scales_rope(self) -> bool:
        kind = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        factors = any(tensor.name.startswith(_ROPE_FACTORS) for tensor in self.tensors)
        return factors or kind != "none"

    def correct(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Gives the tokenizer the file's own special tokens: transformers 5.17 mixes them up."""
        tokens = self.metadata[TOKENS]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown")):
            number = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if number is None or number >= len(tokens):
                continue
            if tokenizer.convert_tokens_to_ids(tokens[number]) == number:
                setattr(tokenizer, f"{name}_token", tokens[number])

    def fill(self) -> None:
        """Copies the tensors of a multi-part model to where its joined header says they are.

        Raises OutOfMemoryError where there is no room for them.
        """
        if len(self.parts) == 1:
            return
        places = iter(_layout(self.tensors, self.parts[0][1].alignment)[0])
        start = len(_joined_header(self.parts))
        try:
            with (self.folder / self.file).open("r+b") as target:
                for path, header in self.parts:
                    with path.open("rb") as part:
                        for tensor in header.tensors:
                            part.seek(tensor.start)
                            target.seek(start + next(places))
                            copy(part, target, tensor.size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OutOfMemoryError(
                f"no space left in {tempfile.gettempdir()} to make one file of the "
                f"{len(self.parts)} parts of {self.path.name}",
                "free some space, or set TMPDIR to a folder on another disk",
                code="temporary-disk-full",
            ) from error


@contextmanager
def opened(path: Path) -> Iterator[GgufModel]:
    """The model at the path of its file or of any part; temporary files last as long as the block.

    Raises UsageError for anything that can be found wrong before tensors are read.
    """
    if not path.is_file():
        raise UsageError(
            f"GGUF file {path} does not exist",
            "check the path",
            code="model-missing",
            field="model",
            path=path,
        )
    _require_packages()
    parts = _parts(path)
    _check(path, parts)
    with tempfile.TemporaryDirectory(prefix="amkv-gguf-") as folder:
        model = GgufModel(path, Path(folder), parts)
        whole = model.folder / model.file
        if len(parts) == 1:
            _link(path, whole)
        else:
            header = _joined_header(parts)
            size = _layout(model.tensors, parts[0][1].alignment)[1]
            whole.write_bytes(header)
            os.truncate(whole, len(header) + size)  # a hole takes no disk space until it is filled
        yield model


def explain(error: Exception, model: GgufModel) -> AmkvError | None:
    """The error a user should see when transformers fails on a GGUF model; None if not known."""
    text = str(error)
    if "architecture" in text and ("not supported" in text or "Cannot rebuild" in text):
        return UsageError(
            f"transformers {transformers_version} does not read GGUF files of the architecture "
            f"{model.architecture}, such as {model.path.name}",
            _OTHER_FORM,
            code="gguf-unreadable",
            field="model",
            architecture=model.architecture,
        )
    if "Unknown gguf model_type" in text:
        return UsageError(
            f"the package gguf does not know the architecture {model.architecture} of "
            f"{model.path.name}",
            f"pip install --upgrade gguf, or {_OTHER_FORM}",
            code="gguf-package-too-old",
            field="model",
            architecture=model.architecture,
        )
    return None


def no_tokenizer(error: Exception, model: GgufModel) -> AmkvError:
    """The error a user should see when transformers cannot make the file's tokenizer."""
    kind = model.metadata.get("tokenizer.ggml.model", "unknown")
    return UsageError(
        f"transformers {transformers_version} cannot make the tokenizer of {model.path.name}, of "
        f"the kind {kind}: {(str(error) or type(error).__name__).splitlines()[0]}",
        f"pip install --upgrade transformers, or {_OTHER_FORM}",
        code="gguf-tokenizer-unreadable",
        field="model",
        tokenizer=kind,
    )


def _scaled(config: PreTrainedConfig) -> bool:
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer.
    sets = [part for part in found.values() if isinstance(part, dict)] or [found]
    return any(part.get("rope_type", "default") != "default" for part in sets)


# ---- what can be checked -----------------------------------------------------------------------


def _require_packages() -> None:
    # transformers needs accelerate for GGUF files, and for nothing else here.
    there = {"gguf": is_gguf_available(), "accelerate": is_accelerate_available()}
    absent = [name for name, found in there.items() if not found]
    if absent:
        raise UsageError(
            f"GGUF models want the package {' and '.join(absent)}",
            "pip install 'amkv[gguf]'",
            code="package-missing",
            package=" and ".join(absent),
        )


def _parts(path: Path) -> tuple[tuple[Path, Header], ...]:
    """The file, or all the parts it belongs to; raises UsageError for a missing part."""
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    if count <= 1:
        return ((path, header),)
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise UsageError(
            f"{path} is one of {count} parts, and its name does not say what the others are called",
            f"name them as they were made: model-00001-of-{count:05}.gguf and so on",
            code="gguf-part-missing",
            field="model",
            path=path,
        )
    found = []
    for i in range(count):
        part = path.with_name(f"{name['stem']}-{i + 1:05}-of-{count:05}{path.suffix}")
        if not part.is_file():
            raise UsageError(
                f"part {i + 1} of {count} is missing: there is no {part}",
                "put all parts into one folder",
                code="gguf-part-missing",
                field="model",
                path=part,
            )
        found.append((part, read_header(part)))
        said = found[-1][1].metadata
        if (said.get("split.count"), said.get("split.no")) != (count, i):
            raise UsageError(
                f"{part} is not part {i + 1} of {count}, by what is in it",
                "download it again",
                code="gguf-part-missing",
                field="model",
                path=part,
            )
    return tuple(found)


def _check(path: Path, parts: tuple[tuple[Path, Header], ...]) -> None:
    metadata = parts[0][1].metadata
    tensors = [tensor for _, header in parts for tensor in header.tensors]
    if not metadata.get("general.architecture"):
        raise UsageError(
            f"{path} does not say of which architecture it is",
            _OTHER_FORM,
            code="gguf-incomplete",
            field="model",
            path=path,
        )
    if len(tensors) < metadata.get("split.tensors.count", 0) or not tensors:
        raise UsageError(
            f"{path} has no tensors, or not all of them",
            "download it again",
            code="gguf-damaged",
            field="model",
            path=path,
        )
    if not metadata.get(TOKENS):
        raise UsageError(
            f"{path} has no tokenizer",
            _OTHER_FORM,
            code="gguf-incomplete",
            field="model",
            path=path,
        )
    from gguf import GGMLQuantizationType, dequantize

    for kind, (_, size) in {tensor.kind: tensor.block for tensor in tensors}.items():
        try:
            dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType(kind))
        except NotImplementedError:
            name = GGMLQuantizationType(kind).name
            raise UsageError(
                f"{path} has tensors of the type {name}, which the package gguf cannot unpack",
                "take a file of another type, such as Q4_K_M, or pip install --upgrade gguf",
                code="gguf-type-unknown",
                field="model",
                path=path,
                type=name,
            ) from None


# ---- one file of several -----------------------------------------------------------------------


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path.absolute())
    except OSError:  # some systems restrict who may make links
        os.link(path.absolute(), link)


def _layout(tensors: list[Tensor], alignment: int) -> tuple[list[int], int]:
    """Where each tensor begins, relative to the first, and where the last one ends."""
    places, end = [], 0
    for tensor in tensors:
        places.append(end)
        end += -(-tensor.size // alignment) * alignment
    return places, end


def _joined_header(parts: tuple[tuple[Path, Header], ...]) -> bytes:
    """The header: the metadata of the first part and the tensor table of all parts."""
    path, first = parts[0]
    tensors = [tensor for _, header in parts for tensor in header.tensors]
    begin, end = first.fields
    with path.open("rb") as file:
        file.seek(begin)
        fields = file.read(end - begin)
    places = _layout(tensors, first.alignment)[0]
    head = b"".join(
        (
            MAGIC,
            integer("I", first.version),
            integer("Q", len(tensors)),
            integer("Q", first.field_count),
            fields,
            *(tensor.entry(place) for tensor, place in zip(tensors, places, strict=True)),
        )
    )
    return head + bytes(-len(head) % first.alignment)


def copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Copies `count` bytes from one file to another. Raises EOFError if there are fewer."""
    while count:
        piece = source.read(min(count, _COPIED_AT_ONCE))
        if not piece:
            raise EOFError("a part ends before its tensors do")
        target.write(piece)
        count -= len(piece)
