"""What a user relies on when opening a file from somewhere: no crash, no hang, no big allocation,
only FormatError; and views that stay right. Damaged files are in test_format_fuzz.py."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from format_samples import VECTORS, sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amkv_format import AmkvFile, FormatError, canonical_json, limits, write_file

GOOD = [path.read_bytes() for path in sorted((VECTORS / "good").glob("*.amkv"))]
fuzzing = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _no_tracing_left_on() -> Iterator[None]:
    yield
    tracemalloc.stop()


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        AmkvFile.open(path)
    return caught.value.code


def framed(header: str, payload: bytes = b"") -> bytes:
    raw = header.encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + payload


def survives(path: Path, data: bytes) -> bool:
    """Whether `data` is accepted; anything but acceptance or FormatError is a failure."""
    path.write_bytes(data)
    accepted = False
    tracemalloc.start()
    with suppress(FormatError), AmkvFile.open(path) as file:
        file.verify()
        accepted = True
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 + 40 * len(data), f"{peak} bytes for a file of {len(data)}"
    return accepted


NASTY = ("0", "-1", "1.0", "true", "null", "[]", "{}", '"1"', "1e400", "2147483648", str(2**62))


@fuzzing
@given(
    data=st.sampled_from(GOOD),
    which=st.integers(0, 10**6),
    value=st.sampled_from(NASTY),
    inside=st.booleans(),
)
def test_lying_numbers(data: bytes, which: int, value: str, inside: bool, tmp_path: Path) -> None:
    """Replaces one number of the header, or of the manifest in it, and keeps the rest right."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = header["__metadata__"]["amkv"] if inside else canonical_json(header)
    numbers = list(re.finditer(r"(?<=[\[:,])-?\d+(\.\d+)?(?=[\],}])", text))
    hit = numbers[which % len(numbers)]
    text = text[: hit.start()] + value + text[hit.end() :]
    if inside:
        header["__metadata__"]["amkv"] = text
        text = canonical_json(header)
    survives(tmp_path / "f", framed(text, data[8 + length :]))


@settings(fuzzing, max_examples=150)
@given(text=st.text(alphabet='{}[]":,\\u0123eE+-. \n\x00é', max_size=60), inside=st.booleans())
def test_any_json_like_text(text: str, inside: bool, tmp_path: Path) -> None:
    header = canonical_json({"__metadata__": {"amkv": text}}) if inside else "{" + text + "}"
    assert not survives(tmp_path / "f", framed(header))


@pytest.mark.parametrize("bomb", ["[", "[[", '{"a":', '[{"a":'])
def test_nesting_bombs_do_not_exhaust_the_stack(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.amkv"
    path.write_bytes(framed('{"x":' + bomb * 200_000 + "}"))
    assert refusal(path) in ("json-too-deep", "json-invalid")
    nested = canonical_json({"__metadata__": {"amkv": bomb * 100_000}})
    path.write_bytes(framed(nested))
    assert refusal(path) in ("json-too-deep", "json-invalid")


def test_depth_does_not_depend_on_the_callers_stack(tmp_path: Path) -> None:
    described, contents = sample()
    nested: object = 1
    for _ in range(limits.MAX_JSON_DEPTH - 1):
        nested = [nested]
    described["x"] = nested  # the manifest itself is the outermost level
    write_file(tmp_path / "f.amkv", described, contents)
    described["x"] = [nested]
    with pytest.raises(FormatError, match="json-too-deep"):
        write_file(tmp_path / "g.amkv", described, contents)


@pytest.mark.parametrize("item", ["[]", "{}", '"a"', "1"])
def test_many_values_are_refused_before_they_are_made(item: str, tmp_path: Path) -> None:
    path = tmp_path / "many.amkv"
    count = limits.MAX_HEADER_BYTES // (len(item) + 1) - 16
    path.write_bytes(framed('{"x":[' + f"{item}," * count + "1]}"))
    tracemalloc.start()
    assert refusal(path) == "json-too-large"
    assert tracemalloc.get_traced_memory()[1] < 4 * limits.MAX_HEADER_BYTES


def test_too_many_tensors(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    entries = ",".join(f'"ext.{i}":{entry}' for i in range(limits.MAX_TENSORS + 1))
    path = tmp_path / "many.amkv"
    path.write_bytes(framed("{" + entries + "}"))
    assert refusal(path) == "too-many-tensors"


def test_a_manifest_above_the_limit(tmp_path: Path) -> None:
    text = '{"x":"' + "é" * (limits.MAX_MANIFEST_BYTES // 2) + '"}'
    path = tmp_path / "large.amkv"
    path.write_bytes(framed(canonical_json({"__metadata__": {"amkv": text}})))
    assert refusal(path) == "manifest-too-large"


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "not-regular-file"
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe")
        assert refusal(tmp_path / "pipe") == "not-regular-file"
        assert refusal(Path("/dev/null")) == "not-regular-file"
    with pytest.raises(FileNotFoundError):
        AmkvFile.open(tmp_path / "absent.amkv")


def test_views_are_read_only_aligned_and_outlive_the_file(tmp_path: Path) -> None:
    described, contents = sample()
    path = tmp_path / "f.amkv"
    write_file(path, described, contents)
    with AmkvFile.open(path) as file:
        views = {name: file.read(name) for name in file.tensors}
        for info in file.tensors.values():
            assert info.offset % (4 if info.dtype in ("F32", "I32") else 2) == 0
        with pytest.raises(KeyError):
            file.read("layers.9.keys")
    for spec, data in contents:
        assert views[spec.name] == data
        assert views[spec.name].readonly
    with pytest.raises(ValueError, match="closed"):
        file.read("token_ids")
    file.close()  # a second time does nothing


def test_what_a_loader_asks_for(tmp_path: Path) -> None:
    described, contents = sample()
    write_file(tmp_path / "f.amkv", described, contents)
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        assert file.kind == "compact"
        assert file.logical_length == 8
        assert list(file.token_ids()) == list(range(8))
        assert [layer.stored for layer in file.layers] == [(1, 3), (3, 3), (2,)]
        assert file.layers[1].window == 4
        file.check_beta()
        assert list(file.positions(0) or ()) == [-1, 0, 1, 2]
        assert file.positions(1) is None  # a sliding layer
    # 3 heads of 8 tokens, 12 bytes each, over 6 entries of 12 bytes + beta + position
    assert file.ratio == pytest.approx(3 * 8 * 12 / (6 * 20))
    assert file.manifest["ratio"] == file.ratio


def test_errors_name_the_code_the_value_and_the_place() -> None:
    with pytest.raises(FormatError) as caught:
        AmkvFile.open(VECTORS / "bad/truncated.amkv")
    assert str(caught.value).startswith("payload-truncated: layers.1.values ends at byte")
    assert caught.value.offset == (VECTORS / "bad/truncated.amkv").stat().st_size
    with (
        AmkvFile.open(VECTORS / "bad/position-past-end.amkv") as file,
        pytest.raises(FormatError, match=r"position: layers\.0"),
    ):
        file.positions(0)
    with AmkvFile.open(VECTORS / "bad/beta-nan.amkv") as file:
        with pytest.raises(FormatError, match=r"layers\.0\.beta") as caught:
            file.check_beta()
        beta = file.tensors["layers.0.beta"]
        assert caught.value.offset == beta.offset + 12
        file.token_ids()
