"""Damaged and forged files: what the fuzz tests and `docs/benchmarks/fuzz.py` feed to the reader.

The same seed makes the same files.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from format_samples import VECTORS

# Numbers and other values that a header or a manifest may lie with.
NASTY = (
    "0", "-1", "1", "-0", "1.0", "1e400", "1e-400", "NaN", "-Infinity", "true", "null", "[]", "{}",
    '""', '"1"', '"../x"', '"\\u0000"', '"\\ud800"', "[[]]", "2147483647", "2147483648",
    "4294967296", "281474976710656", "9223372036854775807", "9223372036854775808", "1" * 70,
    '"mixed"', '"int4"', '"k4v4"', '"k3v2"', '"k8v8"', '"store-mixed"', '"store-packed"',
)  # fmt: skip

_VALUE = re.compile(
    r'(?<=[\[:,])(?:-?\d+(?:\.\d+)?|"(?:[^"\\]|\\.)*"|null|true|\[\]|\{\})(?=[,\]}])'
)
_FIELD = re.compile(r'"[^"\\]+":(?:-?\d+(?:\.\d+)?|"(?:[^"\\]|\\.)*"|null|\[[^\[\]{}]*\])')


@dataclass(frozen=True)
class Mutant:
    """A changed file, how it was changed, and which file of the corpus it was."""

    kind: str
    base: int
    data: bytes


def corpus() -> list[bytes]:
    """The good example files."""
    return [path.read_bytes() for path in sorted((VECTORS / "good").glob("*.amkv"))]


def mutated(files: Sequence[bytes], random: Random) -> Mutant:
    """One file of `files`, changed in one of the ways below."""
    base = random.randrange(len(files))
    kind = random.choice(list(KINDS))
    return Mutant(kind, base, KINDS[kind](files[base], files, random))


def flip_bits(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def set_bytes(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 2, 4))):
        at = random.randrange(len(changed))
        run = random.choice((1, 1, 2, 4, 8))
        changed[at : at + run] = bytes([random.choice((0, 0xFF, 0x7F, 0x80, 0x20))]) * run
    return bytes(changed[: len(data)])


def cut(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def grow(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    return data + random.randbytes(random.choice((1, 2, 8, 64)))


def remove_range(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + data[at + random.choice((1, 2, 4, 8, 100)) :]


def header_length(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    near = struct.unpack("<Q", data[:8])[0] + random.choice((-16, -8, -1, 1, 8, 16))
    length = random.choice((near, random.randrange(2**64), 2**24, 2**63, 0, len(data)))
    return struct.pack("<Q", length % 2**64) + data[8:]


def edit_header(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    header, payload = parts(data)
    return joined(edited(header, random), payload)


def edit_manifest(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    header, payload = parts(data)
    found = json.loads(header)
    found["__metadata__"]["amkv"] = edited(found["__metadata__"]["amkv"], random)
    return joined(json.dumps(found, ensure_ascii=False, separators=(",", ":")), payload)


def other_payload(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    return joined(parts(data)[0], parts(random.choice(files))[1])


def splice(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    other = random.choice(files)
    at, start = random.randrange(len(data)), random.randrange(len(other))
    piece = other[start : start + random.choice((4, 16, 64, 1000))]
    end = at + (len(piece) if random.random() < 0.7 else 0)
    return data[:at] + piece + data[end:]


def swap_ranges(data: bytes, files: Sequence[bytes], random: Random) -> bytes:
    header, payload = parts(data)
    if len(payload) < 16:
        return flip_bits(data, files, random)
    size = random.choice((1, 4, 8))
    a, b = sorted(random.sample(range(len(payload) - size), 2))
    changed = bytearray(payload)
    changed[a : a + size], changed[b : b + size] = payload[b : b + size], payload[a : a + size]
    return joined(header, bytes(changed[: len(payload)]))


KINDS: dict[str, Callable[[bytes, Sequence[bytes], Random], bytes]] = {
    made.__name__: made
    for made in (
        flip_bits,
        set_bytes,
        cut,
        grow,
        remove_range,
        header_length,
        edit_header,
        edit_manifest,
        other_payload,
        splice,
        swap_ranges,
    )
}


def parts(data: bytes) -> tuple[str, bytes]:
    """The header's JSON and the payload of a right file."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:end].decode().rstrip(" "), data[end:]


def joined(header: str, payload: bytes) -> bytes:
    """A file whose header length is right, whatever else is not."""
    raw = header.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + payload


def edited(text: str, random: Random) -> str:
    """JSON with a value replaced, or a field removed, doubled, renamed or moved."""
    how = random.choice(("value", "value", "value", "number", "remove", "double", "rename"))
    if how in ("value", "number"):
        hit = random.choice(list(_VALUE.finditer(text)))
        new = random.choice(NASTY)
        if how == "number" and hit.group().isdigit():
            new = str(max(0, int(hit.group()) + random.choice((-8, -4, -1, 1, 4, 8))))
        return text[: hit.start()] + new + text[hit.end() :]
    hit = random.choice(list(_FIELD.finditer(text)))
    field = hit.group()
    new = {"remove": "", "double": f"{field},{field}", "rename": f'"x{field[1:]}'}[how]
    start, end = hit.span()
    if how == "remove":
        end += text[end : end + 1] == ","
    return text[:start] + new + text[end:]
