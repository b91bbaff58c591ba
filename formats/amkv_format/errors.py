"""The one exception of the format and the closed list of its codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum


class Code(StrEnum):
    """Why a file is refused. The strings are stable: tests, scripts and the vectors rely on them.

    A member is equal to its string; `meaning` is the line that the specification prints.
    """

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Code:
        """A string member that carries its meaning."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    # The container.
    NOT_REGULAR = "not-regular-file", "the path is not a regular file"
    TOO_SHORT = "file-too-short", "the file has fewer than the 8 bytes of the header length"
    HEADER_TOO_LARGE = "header-too-large", "the header length is above the limit"
    HEADER_TRUNCATED = "header-truncated", "the header goes on past the end of the file"
    HEADER_FRAME = (
        "header-frame",
        "the header does not begin with `{` and end with `}` and spaces only",
    )
    HEADER_ENCODING = "header-encoding", "the header is not UTF-8"
    HEADER_SCHEMA = "header-schema", "a header entry is not `{dtype, shape, data_offsets}`"
    TOO_MANY_TENSORS = "too-many-tensors", "the number of tensors is above the limit"
    TENSOR_NAME = "tensor-name", "a tensor name is too long, not ASCII, or looks like a path"
    TENSOR_DTYPE = "tensor-dtype", "a tensor has a dtype that the format does not use"
    TENSOR_SHAPE = "tensor-shape", "a shape is not 1 to 8 integers within the limits"
    TENSOR_SIZE = "tensor-size", "a tensor's byte range does not fit its dtype and shape"
    MISALIGNED = (
        "misaligned",
        "the header length is no multiple of 8, or a tensor does not start on its element size",
    )
    PAYLOAD_TRUNCATED = "payload-truncated", "a tensor goes on past the end of the file"
    PAYLOAD_GAP = "payload-gap", "bytes between two tensors belong to none"
    PAYLOAD_OVERLAP = "payload-overlap", "two tensors share bytes"
    PAYLOAD_TRAILING = "payload-trailing", "bytes follow the last tensor"
    # JSON, in the header and in the manifest.
    JSON_INVALID = "json-invalid", "the text is not JSON"
    JSON_DUPLICATE = "json-duplicate-key", "an object has the same key twice"
    JSON_DEPTH = "json-too-deep", "arrays and objects are nested above the limit"
    JSON_SIZE = "json-too-large", "the text has more values than the limit"
    JSON_NUMBER = "json-number", "a number is NaN, infinite, too large or too long"
    JSON_STRING = "json-string", "a string holds a control character or a lone surrogate"
    # The manifest.
    METADATA = "metadata", "the metadata is not the single key `amkv` with a string"
    MANIFEST_SIZE = "manifest-too-large", "the manifest is above the limit"
    MANIFEST_CANONICAL = "manifest-not-canonical", "the manifest is not canonical JSON (verify)"
    FORMAT = "format-unknown", "`format` is not `amkv`"
    VERSION = "version-unsupported", "the major version is not 1"
    FEATURE = "feature-unsupported", "`features_required` names a feature unknown to the reader"
    FIELD_MISSING = "field-missing", "a required field of the manifest is absent"
    FIELD_TYPE = "field-type", "a field of the manifest has the wrong JSON type"
    FIELD_VALUE = "field-value", "a field of the manifest has a value that is not allowed"
    FIELD_CONFLICT = "field-conflict", "two fields of the manifest contradict each other"
    # Manifest against tensors.
    TENSOR_MISSING = "tensor-missing", "a tensor that the manifest calls for is absent"
    TENSOR_UNEXPECTED = "tensor-unexpected", "a tensor is there that the manifest does not allow"
    TENSOR_MISMATCH = "tensor-mismatch", "a tensor's dtype or shape contradicts the manifest"
    RATIO = "ratio-mismatch", "`ratio` is not what the stored tensors give"
    # Contents.
    MANIFEST_HASH = (
        "manifest-hash",
        "the manifest has another hash than it states (verify)",
    )
    PAYLOAD_HASH = (
        "payload-hash",
        "the payload has another hash than the manifest states (verify)",
    )
    TOKEN_ID = "token-id", "a token id is negative (verify)"
    POSITION = "position", "a position is neither -1 nor below the logical length (verify)"
    NOT_FINITE = "not-finite", "a key, value, zero, beta or state is NaN or infinite (verify)"
    SCALE = "scale", "a scale is negative, NaN or infinite (verify)"
    CODE = "code", "a code is outside its range (verify)"


class FormatError(Exception):
    """The bytes are not a valid `.amkv` file.

    code     why, from the closed list
    message  what is wrong, with the value that was seen
    offset   where in the file, in bytes, when that is known
    """

    def __init__(self, code: Code, message: str, offset: int | None = None):
        super().__init__(code, message, offset)
        self.code = code
        self.message = message
        self.offset = offset

    def __str__(self) -> str:
        where = "" if self.offset is None else f" (at byte {self.offset})"
        return f"{self.code}: {self.message}{where}"


@contextmanager
def located(offset: int | None) -> Iterator[None]:
    """Adds `offset`, if known, to FormatErrors raised in the block without an offset."""
    try:
        yield
    except FormatError as error:
        if error.offset is not None or offset is None:
            raise
        raise FormatError(error.code, error.message, offset) from None
