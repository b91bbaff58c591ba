"""Models in GGUF files: the numbers that were written, the file's own identity, one line each."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import gguf
import numpy as np
import tinygguf
import tinymodels as tiny
import tinytokenizer as tt
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.integrations.gguf import gguf_tokenizer_mapping

from amcli.errors import AmkvError, OutOfMemoryError, UsageError
from amcli.models import gguf as ours
from amcli.models import identity, weights
from amcli.models.loading import LoadedModel, load
from amcli.models.memory import Preview
from amkv_format import compare_weights

TENSORS = 9 * 3 + 3


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tinygguf.write(path)
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny-q8.gguf"
    tinygguf.write(path, packed=True)
    return path


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    tinygguf.write(tmp_path / "big.gguf", packed=True, split_max_tensors=13)
    found = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in found] == [f"big-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def refused(spec: object, error: type[AmkvError] = UsageError) -> AmkvError:
    with pytest.raises(error) as caught:
        load(str(spec), device="cpu")
    assert type(caught.value) is error
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


def logits(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.tensor([loaded.chat.open_document("Anna owns a lynx. Who owns an otter?").ids])
    return loaded.model(ids, use_cache=False).logits.float()


def test_the_numbers_are_those_that_were_written(plain: Path) -> None:
    loaded, ids = load(str(plain), device="cpu"), tiny.ids(20)
    assert (loaded.id, loaded.revision) == (str(plain), None)
    want = tinygguf.original()(ids).logits
    torch.testing.assert_close(loaded.model(ids).logits, want, atol=1e-5, rtol=0)
    assert loaded.chat.stop_ids == {loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_packed_weights_become_ordinary_ones_of_the_dtype(packed: Path, dtype: str) -> None:
    loaded = load(str(packed), device="cpu", dtype=dtype)
    projection = loaded.model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(projection) is torch.nn.Linear
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    want = tinygguf.original().get_submodule("model.layers.0.mlp.up_proj").weight
    assert (projection.weight.float() - want).abs().max() < want.abs().max() / 64
    assert not torch.equal(projection.weight.float(), want)  # 8 bits are not all


def test_the_estimate_is_of_the_dtype_and_not_of_the_file(packed: Path) -> None:
    seen: list[Preview] = []
    loaded = load(str(packed), device="cpu", dtype="bfloat16", look=seen.append)
    numbers = sum(p.numel() for p in loaded.model.parameters())
    assert (seen[0].need.parameters, seen[0].need.weights) == (numbers, 2 * numbers)
    assert seen[0].notes == ()


# ---- identity ----------------------------------------------------------------------------------


def test_the_file_alone_says_which_model_it_is(plain: Path, tmp_path: Path) -> None:
    """Neither its name and place, nor another model's files beside it."""
    copy = Path(shutil.copy(plain, tmp_path / "other.name"))  # known by how it begins
    tiny.build("qwen3").config.save_pretrained(tmp_path)
    tt.of("gemma").save_pretrained(tmp_path)
    one, two = load(str(plain), device="cpu"), load(str(copy), device="cpu", dtype="bfloat16")
    mine = one.fingerprint()
    assert two.differences(mine["model"], mine["tokenizer"]) == []
    assert two.id == str(copy)
    assert two.tokenizer.chat_template == tt.CHATML


def test_another_template_is_another_model(plain: Path, tmp_path: Path) -> None:
    tinygguf.write(tmp_path / "b.gguf", template=tt.CHATML + " ")
    mine = load(str(plain), device="cpu").fingerprint()
    found = load(str(tmp_path / "b.gguf"), device="cpu")
    (difference,) = found.differences(mine["model"], mine["tokenizer"])
    assert difference.startswith("chat template: ")


def test_a_folder_made_of_it_is_the_same_model(packed: Path, tmp_path: Path) -> None:
    loaded = load(str(packed), device="cpu")
    config = AutoConfig.from_pretrained(packed.parent, gguf_file=packed.name)
    config.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    folder, mine = load(str(tmp_path), device="cpu"), loaded.fingerprint()
    assert folder.differences(mine["model"], mine["tokenizer"]) == []
    assert torch.equal(logits(folder), logits(loaded))


def test_a_note_of_the_file_in_the_configuration_is_not_the_model(packed: Path) -> None:
    """Models that somebody else loads, for contexts in scripts, bring it along."""
    config = AutoConfig.from_pretrained(packed.parent, gguf_file=packed.name)
    before = identity.config_hash(config)
    config.quantization_config = GgufConfig(gguf_file=str(packed), dequantize=True)
    assert identity.config_hash(config) == before
    config.quantization_config = {"quant_method": "fp8"}
    assert identity.config_hash(config) != before


def test_the_weights_of_a_file_are_those_it_was_made_from(plain: Path) -> None:
    of_file = load(str(plain), device="cpu").identity.weights
    compared = compare_weights(weights.sample(tinygguf.original()), of_file)
    assert (compared.differing, compared.compared > 700) == (0, True)


def test_packed_weights_are_their_own_in_every_dtype(packed: Path) -> None:
    """Eight bits are not the weights they were made from, but unpack to the same in every type."""
    found = [
        load(str(packed), device="cpu", dtype=name).identity.weights
        for name in ("float32", "bfloat16", "float16")
    ]
    for other in found:
        assert compare_weights(found[0], other).differing == 0
    original = compare_weights(weights.sample(tinygguf.original()), found[0])
    assert original.differing > original.compared / 10


# ---- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_alone", [False, True])
def test_any_of_several_parts_is_all_of_them(
    packed: Path, first_alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    options = {"split_max_tensors": 13, "small_first_shard": first_alone}
    tinygguf.write(folder / "big.gguf", packed=True, **options)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    whole = load(str(packed), device="cpu")
    parts = sorted(folder.glob("*.gguf"))
    assert len(parts) == 3 + first_alone
    for part in (parts[0], parts[-1]):
        seen: list[Preview] = []
        loaded = load(str(part), device="cpu", look=seen.append)
        mine = whole.fingerprint()
        assert loaded.differences(mine["model"], mine["tokenizer"]) == []
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], tensor), name
        assert seen[0].need.parameters == sum(p.numel() for p in whole.model.parameters())
    assert list(temporary.iterdir()) == []


def test_parts_take_no_space_before_the_weights_are_read(parts: list[Path]) -> None:
    with ours.opened(parts[0]) as model:
        file = model.folder / model.file
        assert len(model.tensors) == TENSORS
        before = file.stat().st_blocks * 512
        assert before < file.stat().st_size  # the header is there, and the rest is a hole
        model.fill()
        assert file.stat().st_blocks * 512 > before


def test_a_part_that_is_missing_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        message = refused(part).message
        assert message.startswith("part 2 of 3 is missing")
        assert str(parts[1]) in message


def test_parts_under_wrong_names(parts: list[Path]) -> None:
    shutil.copy(parts[0], parts[1])
    assert f"{parts[1]} is not part 2 of 3" in refused(parts[0]).message
    alone = parts[0].rename(parts[0].with_name("first.gguf"))
    error = refused(alone)
    assert "is one of 3 parts" in error.message
    assert "model-00001-of-00003.gguf" in (error.hint or "")


def test_no_room_for_one_file_of_all(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ours, "copy", full)
    error = refused(parts[0], OutOfMemoryError)
    assert "3 parts" in error.message
    assert "TMPDIR" in (error.hint or "")


# ---- templates and silence ---------------------------------------------------------------------


def test_without_a_template_a_line_says_what_to_do(tmp_path: Path) -> None:
    tinygguf.write(tmp_path / "base.gguf", template=None)
    seen: list[Preview] = []
    loaded = load(str(tmp_path / "base.gguf"), device="cpu", look=seen.append)
    assert loaded.chat.raw
    assert loaded.template_hash is None
    (note,) = seen[0].notes
    assert note.startswith("warning: base.gguf has no chat template")
    assert "tokenizer.chat_template" in note


def test_rope_that_transformers_does_not_scale_is_said(tmp_path: Path) -> None:
    """As in Llama 3.1: the factors are a tensor, which the reader passes over."""

    def factors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.array([1, 1, 4, 8], np.float32))

    def kind(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)

    for edit in (factors, kind):
        tinygguf.write(tmp_path / "x.gguf", edit=edit)
        seen: list[Preview] = []
        loaded = load(str(tmp_path / "x.gguf"), device="cpu", look=seen.append)
        assert loaded.model.config.rope_parameters["rope_type"] == "default"
        (note,) = seen[0].notes
        assert note.startswith("warning: x.gguf scales its RoPE")


def test_loading_is_silent(parts: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    load(str(parts[0]), device="cpu", dtype="bfloat16")
    assert capfd.readouterr() == ("", "")


# ---- refusals ----------------------------------------------------------------------------------


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    for spec in (tmp_path / "no.gguf", "no.gguf", "models/no.gguf"):
        assert f"GGUF file {spec} does not exist" in refused(spec).message


def test_a_folder_of_gguf_files_names_one(plain: Path) -> None:
    error = refused(plain.parent)
    assert "GGUF files" in error.message
    assert str(plain) in (error.hint or "")


@pytest.mark.parametrize("keep", [2, 10, 100, 3000, -1])
def test_a_file_that_is_cut_off(plain: Path, keep: int, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(plain.read_bytes()[:keep])
    message = refused(tmp_path / "cut.gguf").message
    assert ("is not a GGUF file" if 0 < keep < 4 else "damaged or cut off") in message


def test_a_file_of_something_else(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1")
    assert "is not a GGUF file" in refused(path).message
    data = plain.read_bytes()
    path.write_bytes(data[:4] + b"\x00\x00\x00\x03" + data[8:])
    assert "big end first" in refused(path).message
    path.write_bytes(data[:4] + b"\x01\x00\x00\x00" + data[8:])
    assert "of version 1" in refused(path).message


def test_an_architecture_that_is_not_read(tmp_path: Path) -> None:
    tinygguf.write(tmp_path / "x.gguf", architecture="rwkv7")
    error = refused(tmp_path / "x.gguf")
    assert re.search(r"transformers \S+ does not read GGUF files of .* rwkv7", error.message)
    assert "folder or hub id" in (error.hint or "")


def test_what_is_no_language_model(tmp_path: Path) -> None:
    tinygguf.write(tmp_path / "x.gguf", tokenizer=False)
    assert "has no tokenizer" in refused(tmp_path / "x.gguf").message


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    tinygguf.write(tmp_path / "x.gguf", leave_out=["blk.1.ffn_up.weight"])
    message = refused(tmp_path / "x.gguf").message
    assert "incomplete: 1 tensors" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


@pytest.mark.skipif(
    not hasattr(gguf_tokenizer_mapping, "GGUF_TOKENIZER_TYPES"),
    reason="older versions of transformers go by the architecture",
)
def test_a_tokenizer_that_cannot_be_made(plain: Path, tmp_path: Path) -> None:
    data = plain.read_bytes()
    key = b"tokenizer.ggml.model" + (8).to_bytes(4, "little") + (4).to_bytes(8, "little")
    assert key + b"gpt2" in data
    (tmp_path / "x.gguf").write_bytes(data.replace(key + b"gpt2", key + b"rwkv"))
    message = refused(tmp_path / "x.gguf").message
    assert "cannot make the tokenizer" in message
    assert "rwkv" in message


@pytest.mark.parametrize(("kind", "words"), [(9, "Q8_1, which"), (77, "of type 77, which")])
def test_types_that_nobody_unpacks(plain: Path, kind: int, words: str, tmp_path: Path) -> None:
    data, name = plain.read_bytes(), b"blk.0.attn_norm.weight"
    at = data.index(name) + len(name) + 4 + 8  # behind the number of dimensions, and the only one
    (tmp_path / "x.gguf").write_bytes(data[:at] + kind.to_bytes(4, "little") + data[at + 4 :])
    assert words in refused(tmp_path / "x.gguf").message


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_the_extra(plain: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, f"is_{package}_available", lambda: False)
    error = refused(plain)
    assert f"package {package}" in error.message
    assert error.hint == "pip install 'amkv[gguf]'"


def test_a_model_somebody_else_loads_has_the_same_hash(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name)
    assert identity.config_hash(model.config) == load(str(packed), device="cpu").config_hash


def test_the_types_of_the_tests_are_those_of_the_package() -> None:
    assert gguf.GGMLQuantizationType(9).name == "Q8_1"
    assert 77 not in {int(kind) for kind in gguf.GGML_QUANT_SIZES}
