"""What is written can be read, and what could not be read is not written."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from format_samples import Tensors, fill, names, run, sample
from format_strategies import samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amkv_format import (
    ITEM_BYTES,
    AmkvFile,
    FormatError,
    TensorSpec,
    Writer,
    write_file,
    writer,
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(made=samples(), cuts=st.lists(st.integers(1, 40), min_size=1), order=st.randoms())
def test_round_trip_of_any_manifest_and_any_chunks(
    made: tuple[dict[str, Any], Tensors], cuts: list[int], order: Any, tmp_path: Path
) -> None:
    described, contents = made
    path = tmp_path / "f.amkv"
    shuffled = list(contents)
    order.shuffle(shuffled)
    with Writer(path, [spec for spec, _ in contents], overwrite=True) as out:
        for spec, data in shuffled:
            start = 0
            while start < len(data):
                size = cuts[start % len(cuts)]
                out.write(spec.name, data[start : start + size])
                start += size
        complete = out.finish(described)
    with AmkvFile.open(path) as file:
        file.verify()
        assert file.manifest == complete
        assert file.store == described.get("store", "native")
        assert complete.items() >= described.items()
        assert {name: bytes(file.read(name)) for name in file.tensors} == {
            spec.name: data for spec, data in contents
        }
    assert names(tmp_path) == ["f.amkv"]


def test_threads_may_write_tensors_side_by_side(tmp_path: Path) -> None:
    described, contents = sample()
    write_file(tmp_path / "a.amkv", described, contents)
    with Writer(tmp_path / "b.amkv", [spec for spec, _ in contents]) as out:

        def fill_in(spec: TensorSpec, data: bytes) -> None:
            for i in range(len(data)):
                out.write(spec.name, data[i : i + 1])

        with ThreadPoolExecutor(len(contents)) as threads:
            for done in [threads.submit(fill_in, *one) for one in contents]:
                done.result()
        out.finish(described)
    first, second = (AmkvFile.open(tmp_path / name) for name in ("a.amkv", "b.amkv"))
    with first, second:
        second.verify()
        assert first.manifest["payload_hash"] == second.manifest["payload_hash"]


def test_what_the_writer_fills_in_and_what_it_leaves(tmp_path: Path) -> None:
    described, contents = sample()
    complete = write_file(tmp_path / "a.amkv", described, contents)
    assert complete["format"] == "amkv"
    assert complete["version"] == "1.3"  # the first version that has all it uses
    assert complete["features_required"] == []
    assert complete["created"].endswith("Z")
    again = write_file(tmp_path / "b.amkv", complete, contents)
    assert again == complete
    assert (tmp_path / "a.amkv").read_bytes() == (tmp_path / "b.amkv").read_bytes()


def test_a_wrong_ratio_is_refused(tmp_path: Path) -> None:
    described, contents = sample()
    described["ratio"] = 20.0
    with pytest.raises(FormatError, match="ratio-mismatch"):
        write_file(tmp_path / "f.amkv", described, contents)
    assert names(tmp_path) == []


@pytest.mark.parametrize("move_chunk", [7, 2**20])
@pytest.mark.parametrize("room", [0, 200, 100_000])
def test_any_room_for_the_manifest_gives_the_same_contents(
    room: int, move_chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MOVE_CHUNK", move_chunk)
    described, contents = sample()
    with Writer(tmp_path / "f.amkv", [spec for spec, _ in contents], room=room) as out:
        fill(out, contents)
        out.finish(described)
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        file.verify()
        for spec, data in contents:
            assert file.read(spec.name) == data


def test_memory_stays_bounded_while_streaming(tmp_path: Path) -> None:
    script = """
        import resource, sys
        sys.path[:0] = sys.argv[2:]
        from amkv_format import TensorSpec, Writer, AmkvFile
        from format_samples import manifest, layer
        rows = 2**16
        described = manifest("prefill", rows, [layer("full", 1, 256, 256)], [[rows]])
        specs = [TensorSpec("token_ids", "I32", (rows,))]
        specs += [TensorSpec(f"layers.0.{p}", "BF16", (rows, 256)) for p in ("keys", "values")]
        chunk = bytes(2**18)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with Writer(sys.argv[1], specs, room=0) as out:
            for spec in specs:
                for _ in range(spec.nbytes // len(chunk)):
                    out.write(spec.name, chunk)
            out.finish(described)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 24 * 2**10, f"{grown} KiB for a file of 64 MiB"
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("ru_maxrss has other units elsewhere")
    run(script, tmp_path / "f.amkv")
    assert (tmp_path / "f.amkv").stat().st_size > 64 * 2**20


def test_misuse_is_refused(tmp_path: Path) -> None:
    described, contents = sample()
    specs = [spec for spec, _ in contents]
    path = tmp_path / "f.amkv"
    with pytest.raises(ValueError, match="was given 0"), Writer(path, specs) as out:
        out.finish(described)
    with pytest.raises(ValueError, match="takes 32 bytes"), Writer(path, specs) as out:
        out.write("token_ids", bytes(33))
    with pytest.raises(ValueError, match=r"finish\(\) was not called"), Writer(path, specs) as out:
        fill(out, contents)
    with pytest.raises(KeyError), Writer(path, specs) as out:
        out.write("layers.7.keys", b"")
    with pytest.raises(ValueError, match="not open"):
        Writer(path, specs).write("token_ids", bytes(4))
    with pytest.raises(FormatError, match="comes twice"):
        Writer(path, [*specs, specs[0]])
    with pytest.raises(FormatError, match="tensor-name"):
        Writer(path, [TensorSpec("../x", "F32", (1,))])
    with pytest.raises(FormatError, match="tensor-dtype"):
        Writer(path, [TensorSpec("x", "F64", (1,))])
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("x", float("nan"), "json-number"),
        ("x", "half \ud800", "json-string"),
        ("x", 2**64, "json-number"),
        ("source", {"name": "a/b"}, "field-value"),
        ("created", "yesterday", "field-value"),
        ("boundary", "", "field-value"),
    ],
)
def test_manifests_that_no_reader_would_take(
    field: str, value: object, code: str, tmp_path: Path
) -> None:
    described, contents = sample()
    described[field] = value
    with pytest.raises(FormatError) as caught:
        write_file(tmp_path / "f.amkv", described, contents)
    assert caught.value.code == code
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("token_ids", b"\xff" * 32, "token-id"),
        ("layers.0.beta", b"\x00\x00\x80\x7f" * 4, "not-finite"),
        ("layers.0.positions", b"\x08\0\0\0" * 4, "position"),
    ],
)
def test_contents_that_no_loader_would_take(
    name: str, data: bytes, code: str, tmp_path: Path
) -> None:
    described, contents = sample()
    changed = [(spec, data if spec.name == name else old) for spec, old in contents]
    with pytest.raises(FormatError) as caught:
        write_file(tmp_path / "f.amkv", described, changed)
    assert caught.value.code == code
    assert names(tmp_path) == []


def test_extension_tensors_are_carried_and_not_interpreted(tmp_path: Path) -> None:
    described, contents = sample()
    # The names and bytes would be refused in a beta or in positions.
    contents += [
        (TensorSpec("ext.beta", "I32", (2,)), b"\xff" * 8),
        (TensorSpec("ext.layers.0.positions", "BF16", (3, 1)), b"\xff" * 6),
    ]
    write_file(tmp_path / "f.amkv", described, contents)
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        file.verify()
        assert file.read("ext.beta") == b"\xff" * 8


def test_tensors_are_aligned_whatever_their_order(tmp_path: Path) -> None:
    described, contents = sample()
    odd = [(TensorSpec(f"ext.{i}", "F16", (1,)), b"\0\0") for i in range(3)]
    write_file(tmp_path / "f.amkv", described, [odd[0], *contents[::-1], *odd[1:]])
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        for info in file.tensors.values():
            assert info.offset % ITEM_BYTES[info.dtype] == 0


def test_systems_that_write_less_than_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reluctant(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:5])

    monkeypatch.setattr(io, "FileIO", Reluctant)
    described, contents = sample()
    write_file(tmp_path / "f.amkv", described, contents)
    monkeypatch.undo()
    with AmkvFile.open(tmp_path / "f.amkv") as file:
        file.verify()
        assert all(file.read(spec.name) == data for spec, data in contents)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("model", "config", {}),
        ("model", "weights", {}),
        ("tokenizer", "turns_hash", "sha256:" + "d" * 64),
    ],
)
def test_what_tells_models_apart_is_of_1_4(
    part: str, field: str, value: object, tmp_path: Path
) -> None:
    manifest, contents = sample("prefill")
    manifest[part] = manifest[part] | {field: value}
    assert write_file(tmp_path / "f.amkv", manifest, contents)["version"] == "1.4"
