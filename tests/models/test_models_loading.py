"""Loading from disk: what comes back, and one line with a hint for everything that goes wrong."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import tinymodels as tiny
import tinytokenizer as tt
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from amcli.errors import AmkvError, OutOfMemoryError, UsageError
from amcli.models import devices, identity, loading, sources
from amcli.models.generate import stream
from amcli.models.identity import config_hash
from amcli.models.loading import load
from amcli.pipeline.contexts.opening import model_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    configuration = tiny.config("qwen3", vocab_size=330, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = [5, 6]
    model.save_pretrained(folder)
    tt.of("chatml").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(error: type[AmkvError], spec: object, **options: object) -> AmkvError:
    with pytest.raises(error) as caught:
        load(str(spec), **options)  # type: ignore[arg-type]
    assert type(caught.value) is error
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


def test_a_folder_loads_ready_to_answer(saved: Path) -> None:
    loaded = load(str(saved), device="cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.id, loaded.revision) == (str(saved.resolve()), None)
    assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
    assert len(loaded.geometry.layers) == 3
    assert loaded.chat.stop_ids >= {5, 6}
    from amcli.models.cache import CompactCache

    context = loaded.chat.open_document("Anna owns a lynx.")
    cache = CompactCache.empty(loaded.geometry)
    ids = context.ids + loaded.chat.first_turn("Who?")
    answer = list(stream(loaded, cache, ids, max_tokens=3, stop_ids=frozenset()))
    assert cache.get_seq_length() == len(ids) + len(answer) == len(ids) + 3


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "bf16"])
def test_the_dtype_asked_for_is_the_dtype_got(saved: Path, name: str) -> None:
    loaded = load(str(saved), device="cpu", dtype=name)
    assert next(loaded.model.parameters()).dtype == loaded.dtype == devices.DTYPES[name]
    manifest = loaded.fingerprint()["model"]["dtype"]
    assert devices.DTYPES[manifest] == loaded.dtype


def test_the_box_is_loaded_by_its_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import amcli.pocket

    monkeypatch.setattr(amcli.pocket, "folder", lambda: saved, raising=False)
    assert load("pocket", device="cpu").id == "pocket"


FIRST, SECOND = "a1" * 20, "b2" * 20


@pytest.fixture
def cached(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as the hub's library makes it, with two commits of one model, of which `main` is
    the second and `v1` the first; nothing else can be reached."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    for commit, seed in ((FIRST, 0), (SECOND, 1)):
        snapshot = repository / "snapshots" / commit
        made = Path(shutil.copytree(saved, tmp_path / commit))
        tensors = load_file(made / "model.safetensors")
        torch.manual_seed(seed)
        moved = {k: x + 0.1 * seed * torch.randn_like(x) for k, x in tensors.items()}
        save_file(moved, made / "model.safetensors", metadata={"format": "pt"})
        for folder in (snapshot, repository / "blobs", repository / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        for file in made.iterdir():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, repository / "blobs" / digest)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", digest))
    (repository / "refs" / "main").write_text(SECOND)
    (repository / "refs" / "v1").write_text(FIRST)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.parametrize(
    ("spec", "commit"),
    [
        ("someone/tiny", SECOND),
        ("someone/tiny@main", SECOND),
        ("someone/tiny@v1", FIRST),
        (f"someone/tiny@{FIRST}", FIRST),
    ],
)
def test_a_hub_revision_is_resolved_to_its_commit(cached: Path, spec: str, commit: str) -> None:
    loaded = load(spec, device="cpu")
    assert (loaded.id, loaded.revision) == ("someone/tiny", commit)
    weights = load_file(cached / "snapshots" / commit / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(loaded.model.get_parameter(name), weights[name].float())


def test_an_artifact_finds_its_commit_when_main_has_moved(cached: Path) -> None:
    (cached / "refs" / "main").write_text(FIRST)
    before = load("someone/tiny", device="cpu").fingerprint()["model"]
    (cached / "refs" / "main").write_text(SECOND)
    artifact: Any = SimpleNamespace(manifest={"model": before})
    again = load(model_of(artifact), device="cpu")
    assert (before["revision"], again.revision) == (FIRST, FIRST)
    mine = load("someone/tiny", device="cpu")
    (found,) = mine.differences(before, mine.fingerprint()["tokenizer"])
    assert found.startswith("weights: ")


def test_all_files_are_of_one_commit(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever moves on the hub between the downloads."""
    original = loading.AutoTokenizer.from_pretrained

    def meanwhile(*args: Any, **options: Any) -> Any:
        (cached / "refs" / "main").write_text(FIRST)
        return original(*args, **options)

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", meanwhile)
    loaded = load("someone/tiny@main", device="cpu")
    name = "model.layers.0.mlp.up_proj.weight"
    weights = load_file(cached / "snapshots" / SECOND / "model.safetensors")
    assert loaded.revision == SECOND
    assert torch.equal(loaded.model.get_parameter(name), weights[name].float())


# ---- identity ----------------------------------------------------------------------------------


def test_a_moved_model_in_another_dtype_is_the_same_model(saved: Path, copy: Path) -> None:
    edit_config(copy, transformers_version="5.17.0", dtype="float16", _name_or_path="elsewhere")
    one, two = load(str(saved), device="cpu"), load(str(copy), device="cpu", dtype="bfloat16")
    mine = one.fingerprint()
    assert two.differences(mine["model"], mine["tokenizer"]) == []
    assert one.config_hash == two.config_hash
    for value in (one.config_hash, one.tokenizer_hash, one.template_hash):
        assert value is not None
        assert value.startswith("sha256:")
        assert len(value) == 7 + 64


def test_a_resaved_model_is_the_same_model(saved: Path, tmp_path: Path) -> None:
    loaded = load(str(saved), device="cpu")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    mine = loaded.fingerprint()
    assert load(str(tmp_path)).differences(mine["model"], mine["tokenizer"]) == []


def test_using_a_tokenizer_does_not_change_its_hash(saved: Path) -> None:
    loaded = load(str(saved), device="cpu")
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    loaded.tokenizer(["a", "b c d"], padding="max_length", max_length=9, truncation=True)
    assert identity.tokenizer_hash(loaded.tokenizer) == loaded.tokenizer_hash


@pytest.mark.parametrize(
    ("architecture", "digits"),
    [
        ("qwen3", "63c34e27776197fd"),
        ("gemma3_text", "4b7c782764fcf0a4"),
        ("glm4", "3fb2fa2413f45aff"),  # a field less in transformers 5.23 than in 5.17
        ("gpt_oss", "4e614cc74b1f22b3"),  # two fields more
    ],
)
def test_the_config_hash_is_the_same_in_every_transformers(architecture: str, digits: str) -> None:
    """Computed with 5.17 and 5.23: artifacts outlive versions."""
    assert config_hash(tiny.config(architecture)).startswith(f"sha256:{digits}")


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_the_config_hash_tells_models_apart(architecture: str) -> None:
    one = config_hash(tiny.config(architecture))
    assert one != config_hash(tiny.config(architecture, intermediate_size=52))
    assert one != config_hash(tiny.config(architecture, max_position_embeddings=512))
    other = tiny.config(architecture)
    other.something_of_its_own = 3
    assert one != config_hash(other)


def test_differences_are_said_in_plain_words(saved: Path, copy: Path) -> None:
    mine = load(str(saved), device="cpu").fingerprint()
    edit_config(copy, rms_norm_eps=0.5)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    (copy / "chat_template.jinja").write_text(tt.GEMMA)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = load(str(copy), device="cpu").differences(mine["model"], mine["tokenizer"])
    digits = mine["tokenizer"]["hash"][7:15]
    assert found[0] == "configuration rms_norm_eps: file 1e-06, model 0.5"
    assert re.fullmatch(
        r"weights: 64 of \d+ numbers differ, such as in model.norm.weight: file 1, model 2",
        found[1],
    )
    assert found[2].startswith(f"tokenizer: file sha256:{digits}…, model sha256:")
    assert found[3].startswith("chat template: file sha256:")
    assert len(found) == 4


def without(model: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in model.items() if name not in names}


def test_a_file_that_only_has_the_hash_of_the_configuration(saved: Path, copy: Path) -> None:
    """As they all were before version 1.4: keys that do nothing may have been added since."""
    mine = load(str(saved), device="cpu").fingerprint()
    old = without(mine["model"], "config", "weights")
    edit_config(copy, rope_interleaved=False, **{"transformers.js_config": {"dtype": "q4"}})
    loaded = load(str(copy), device="cpu")
    assert loaded.differences(old, mine["tokenizer"]) == []
    assert loaded.differences(mine["model"], mine["tokenizer"]) == []
    assert loaded.config_hash != old["config_hash"]  # tools of before see all keys
    edit_config(copy, rms_norm_eps=0.5)
    (found,) = load(str(copy), device="cpu").differences(old, mine["tokenizer"])
    assert found.startswith("config hash: file sha256:")
    assert found.endswith("(the file has no more than the hash, so no key can be named)")


def test_nested_keys_are_named(saved: Path, copy: Path) -> None:
    mine = load(str(saved), device="cpu").fingerprint()
    rope = json.loads((copy / "config.json").read_text())["rope_parameters"]
    edit_config(copy, rope_parameters=rope | {"rope_theta": 5000.0})
    assert load(str(copy), device="cpu").differences(mine["model"], mine["tokenizer"]) == [
        "configuration rope_parameters.rope_theta: file 10000.0, model 5000.0"
    ]
    old = without(mine["model"], "config")
    found = load(str(copy), device="cpu").differences(old, mine["tokenizer"])
    assert found[0].startswith("RoPE: file {")


def test_a_configuration_of_anything_fits_into_a_manifest(copy: Path) -> None:
    """Numbers that are not finite, control characters, deep and long values."""
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    edit_config(copy, a=float("inf"), b="\x00\x1b", c=deep, d="x" * 10**5, e=2**70)
    said = load(str(copy), device="cpu").fingerprint()["model"]["config"]
    assert said["a"] == "inf"
    assert said["b"] == "\\u0000\\u001b"
    assert said["c"].startswith("sha256:")
    assert said["d"].startswith("sha256:")
    assert said["e"] == str(2**70)


def test_differences_name_layers_and_architecture(saved: Path) -> None:
    loaded = load(str(saved), device="cpu")
    mine = loaded.fingerprint()
    fewer = mine["model"] | {"layers": mine["model"]["layers"][:2], "architecture": "Other"}
    assert loaded.differences(fewer, mine["tokenizer"]) == [
        "architecture: file Other, model Qwen3ForCausalLM",
        "layers: file 2, model 3",
    ]
    wider = [layer | {"key_dim": 99} for layer in mine["model"]["layers"]]
    assert loaded.differences(mine["model"] | {"layers": wider}, mine["tokenizer"]) == [
        "layer 0 key_dim: file 99, model 8"
    ]
    raw = {"hash": mine["tokenizer"]["hash"], "template_hash": None}
    assert loaded.differences(mine["model"], raw)[0].startswith("chat template: file none, model")


# ---- silence -----------------------------------------------------------------------------------


def test_loading_is_silent_and_leaves_the_callers_logging_alone(
    saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])  # as for users
    hf_logging.set_verbosity(logging.INFO)
    root = logging.getLogger()
    before = (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), root.level)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(str(saved), device="cpu")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), root.level) == before
    assert capfd.readouterr() == ("", "")
    assert caught == []


def test_logging_is_restored_after_a_failure(copy: Path) -> None:
    hf_logging.set_verbosity(logging.WARNING)
    before = (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled())
    edit_config(copy, model_type="nosuch")
    refused(UsageError, copy)
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


# ---- refusals ----------------------------------------------------------------------------------


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    assert "does not exist" in refused(UsageError, tmp_path / "missing").message
    assert "does not exist" in refused(UsageError, "./missing").message
    (tmp_path / "file.txt").write_text("x")
    assert "is a file" in refused(UsageError, tmp_path / "file.txt").message
    refused(UsageError, "")


@pytest.mark.parametrize(
    ("pattern", "what"),
    [("config.json", "config.json"), ("tokenizer*", "tokenizer"), ("*.safetensors", "weights")],
)
def test_folders_with_something_missing(copy: Path, pattern: str, what: str) -> None:
    for path in copy.glob(pattern):
        path.unlink()
    assert f"has no {what}" in refused(UsageError, copy).message


def test_damaged_files(copy: Path) -> None:
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:100])
    assert "damaged" in refused(UsageError, copy).message
    (copy / "config.json").write_text("{")
    assert "not valid JSON" in refused(UsageError, copy).message


def test_missing_tensors_are_not_filled_with_noise(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    message = refused(UsageError, copy).message
    assert "1 tensors" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_architectures_that_cannot_be_used(copy: Path) -> None:
    edit_config(copy, model_type="nosuch")
    assert "does not know the architecture" in refused(UsageError, copy).message
    AutoConfig.for_model("vit").save_pretrained(copy)
    assert "not a causal language model" in refused(UsageError, copy).message
    AutoConfig.for_model("t5").save_pretrained(copy)
    assert "encoder-decoder" in refused(UsageError, copy).message


def test_remote_code_is_not_run_unasked(copy: Path) -> None:
    edit_config(copy, model_type="mine", auto_map={"AutoConfig": "code.MyConfig"})
    (copy / "code.py").write_text("raise SystemExit('the code was run')")
    assert "its own code" in refused(UsageError, copy).message


def test_devices_and_dtypes_that_are_not_there(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unknown device" in refused(UsageError, saved, device="warp9").message
    assert "unknown dtype" in refused(UsageError, saved, device="cpu", dtype="int3").message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = refused(UsageError, saved, device="cuda")
    assert "no CUDA device" in absent.message
    assert absent.code in ("gpu-missing", "gpu-not-supported")
    assert absent.field == "device"
    assert "device='cpu'" in (absent.hint or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "there are 1" in refused(UsageError, saved, device="cuda:3").message


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)  # fmt: skip
def test_too_little_memory(
    saved: Path, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    assert refused(OutOfMemoryError, saved, device="cpu").exit_code == 5


def hub_failure(kind: type[Exception]) -> Exception:
    """What transformers raises: its own OSError, with the hub's error as the cause."""
    if issubclass(kind, hub.HfHubHTTPError):
        cause: Exception = kind.__new__(kind)
        Exception.__init__(cause, "the hub said no")
    else:
        cause = kind("the hub said no")
    error = OSError("two lines\nof explanation")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("cause", "offline", "expected", "words"),
    [
        (hub.GatedRepoError, False, UsageError, "is gated"),
        (hub.RepositoryNotFoundError, False, UsageError, "there is no model"),
        (hub.RevisionNotFoundError, False, UsageError, "has no revision v9"),
        (hub.LocalEntryNotFoundError, False, AmkvError, "cannot be reached"),
        (hub.LocalEntryNotFoundError, True, AmkvError, "HF_HUB_OFFLINE is set"),
        (hub.OfflineModeIsEnabled, True, AmkvError, "HF_HUB_OFFLINE is set"),
        (ZeroDivisionError, False, AmkvError, "cannot load someone/model: two lines"),
    ],
)
def test_hub_failures(
    cause: type[Exception],
    offline: bool,
    expected: type[AmkvError],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise hub_failure(cause)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(sources, "cached_file", fail)
    assert words in refused(expected, "someone/model@v9").message


def test_offline_and_not_in_the_cache_for_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "HF_HUB_OFFLINE is set" in refused(AmkvError, "someone/model").message
