"""verify: every file has its verdict, with code and place, and the exit code of the worst."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helptext import documented
from safetensors.torch import load_file, save_file

from amcli.pocket import folder as pocket_folder
from amkv_format import AmkvFile, write_file
from conftest import Amkv

VECTORS = Path(__file__).parents[2] / "formats" / "vectors"
INDEX = json.loads((VECTORS / "vectors.json").read_text(encoding="utf-8"))


def test_all_examples_at_once(amkv: Amkv) -> None:
    entries = INDEX["good"] + INDEX["bad"]
    done = amkv("verify", "--deep", "--json", *(VECTORS / entry["file"] for entry in entries))
    assert done.code == 3
    record = json.loads(done.out)
    assert set(record) == documented("verify")
    assert record["valid"] is False
    assert [x["code"] for x in record["files"]] == [entry.get("code") for entry in entries]
    for found in record["files"]:
        assert (found["status"] == "valid") == (found["code"] is None)
        if found["status"] == "invalid":  # each fault of the examples has a place in the file
            size = Path(found["file"]).stat().st_size
            assert found["offset"] is not None, found
            assert 0 <= found["offset"] <= size


def test_a_valid_file(amkv: Amkv, compact: Path, here: Path) -> None:
    done = amkv("verify", compact)
    assert (done.code, done.errors) == (0, [])
    assert done.out.startswith("doc.amkv: ok (compact, format 1.")
    assert json.loads(amkv("verify", compact, "--json").out)["valid"] is True


def test_a_changed_byte_is_found_where_it_is_looked_for(amkv: Amkv, compact: Path) -> None:
    data = bytearray(compact.read_bytes())
    data[-1] ^= 1
    compact.write_bytes(data)
    assert amkv("verify", compact).code == 0
    done = amkv("verify", "--deep", compact)
    assert done.code == 3
    start = 8 + int.from_bytes(data[:8], "little")
    assert done.out.startswith(f"doc.amkv: payload-hash at byte {start}: ")
    assert done.errors[0] == "error: doc.amkv is not a valid .amkv file"


def test_a_changed_manifest_is_found_without_deep(amkv: Amkv, compact: Path) -> None:
    data = compact.read_bytes()
    assert data.count(b"doc.txt") == 1
    compact.write_bytes(data.replace(b"doc.txt", b"dog.txt"))
    done = amkv("verify", compact)
    assert done.code == 3
    assert ": manifest-hash at byte " in done.out
    for words in (("inspect", compact), ("chat", "-c", compact, "-p", "x")):  # nor is it used
        assert amkv(*words).code == 3


def test_files_are_all_reported_and_the_worst_decides(
    amkv: Amkv, compact: Path, full: Path, here: Path
) -> None:
    cut = here / "cut.amkv"
    cut.write_bytes(compact.read_bytes()[:-1])
    done = amkv("verify", compact, "no.amkv", cut, full, here)
    lines = done.out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "doc.amkv", "no.amkv", str(cut), "doc.prefill.amkv", str(here),
    ]  # fmt: skip
    assert "no such file" in lines[1]
    assert "payload-truncated at byte" in lines[2]
    assert "not-regular-file" in lines[4]
    assert done.code == 3
    assert done.errors[0] == "error: 2 of 5 files are not valid .amkv files"
    assert amkv("verify", compact, "no.amkv").code == 2


def test_a_file_cannot_drive_the_terminal(amkv: Amkv, here: Path) -> None:
    path = here / "\x1b[2Jx.amkv"
    path.write_bytes(b"nothing")
    done = amkv("verify", path)
    assert done.code == 3
    assert "\x1b" not in done.out + done.err


# ---- the fit to a model ------------------------------------------------------------------------


def edit(name: str, change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    """A change of one of the model's JSON files."""

    def apply(model: Path) -> None:
        content = json.loads((model / name).read_text(encoding="utf-8"))
        change(content)
        (model / name).write_text(json.dumps(content), encoding="utf-8")

    return apply


def other_template(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + "{# changed #}!", encoding="utf-8")


def other_weights(model: Path) -> None:
    """A fine-tune: the same shape, and numbers that are not far."""
    tensors = load_file(model / "model.safetensors")
    torch.manual_seed(0)
    tuned = {name: x * (1 + 0.02 * torch.randn_like(x)) for name, x in tensors.items()}
    save_file(tuned, model / "model.safetensors", metadata={"format": "pt"})


def other_theta(config: dict[str, object]) -> None:
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    rope["rope_theta"] *= 2


def other_word(tokenizer: dict[str, object]) -> None:
    model = tokenizer["model"]
    assert isinstance(model, dict)
    vocabulary = model["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[-2:]
    vocabulary |= {a: j, b: i}


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "configuration": (
        edit("config.json", lambda config: config.update(rms_norm_eps=0.01)),
        "configuration rms_norm_eps: file 1e-06, model 0.01",
    ),
    "rope": (
        edit("config.json", other_theta),
        "rope_parameters.rope_theta: file 100000.0, model 200000.0",
    ),
    "tokenizer": (edit("tokenizer.json", other_word), "tokenizer: file sha256:"),
    "weights": (other_weights, "weights: "),
    "chat template": (other_template, "chat template: file sha256:"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_another_model_is_refused(
    amkv: Amkv, full: Path, compact: Path, here: Path, changed: str
) -> None:
    change, words = CHANGES[changed]
    model = here / "model"
    shutil.copytree(pocket_folder(), model)
    change(model)
    done = amkv("verify", full, compact, "--model", "./model")
    assert done.code == 4
    assert done.out.count(words) == 2
    assert done.errors[0] == "error: 2 of 2 files do not fit ./model"
    assert amkv("chat", "-c", compact, "--model", "./model", "-p", "x").code == 4


def test_the_same_model_elsewhere_fits(amkv: Amkv, full: Path, compact: Path, here: Path) -> None:
    shutil.copytree(pocket_folder(), here / "model")
    done = amkv("verify", "--deep", full, compact, "--model", "./model", "--json")
    assert done.code == 0
    assert [x["differs"] for x in json.loads(done.out)["files"]] == [[], []]


def harmless(model: Path) -> None:
    edit("config.json", lambda config: config.update(rope_interleaved=False))(model)
    edit("config.json", lambda config: config.update({"transformers.js_config": {"a": 1}}))(model)


def test_keys_that_do_nothing_do_not_refuse(
    amkv: Amkv, full: Path, compact: Path, here: Path
) -> None:
    shutil.copytree(pocket_folder(), here / "model")
    harmless(here / "model")
    assert amkv("verify", full, compact, "--model", "./model").code == 0
    assert (
        amkv("chat", "-c", compact, "--model", "./model", "-p", "x", "--max-tokens", "2").code == 0
    )


def test_a_file_without_weights_cannot_tell(amkv: Amkv, compact: Path, here: Path) -> None:
    """Those of before version 1.4, with other weights of the same shape, and with the same."""
    with AmkvFile.open(compact) as file:
        manifest = json.loads(json.dumps(file.manifest))
        tensors = [(spec, bytes(file.read(name))) for name, spec in file.tensors.items()]
    for name in ("weights", "config"):
        del manifest["model"][name]
    del manifest["tokenizer"]["turns_hash"]
    write_file(here / "old.amkv", manifest, tensors)
    shutil.copytree(pocket_folder(), here / "model")
    for change in (lambda model: None, other_weights):
        change(here / "model")
        done = amkv("verify", "old.amkv", "--model", "./model")
        assert (done.code, "does not say with which weights" in done.out) == (0, True)
    found = json.loads(amkv("verify", "old.amkv", compact, "--model", "pocket", "--json").out)
    assert [x["untold"] for x in found["files"]] == [["weights"], []]
    assert json.loads(amkv("verify", compact, "--json").out)["files"][0]["untold"] is None


def test_a_model_folder_that_was_moved(amkv: Amkv, here: Path) -> None:
    shutil.copytree(pocket_folder(), here / "model")
    assert amkv("prefill", "doc.txt", "--model", "./model").code == 0
    (here / "elsewhere").mkdir()
    (here / "model").rename(here / "elsewhere" / "my model")
    line = ("chat", "-c", "doc.prefill.amkv", "-p", "Who?", "--max-tokens", "2")
    done = amkv(*line)
    assert done.code == 2
    assert f"is not where it was: model folder {here / 'model'} does not exist" in done.errors[0]
    typed = "amkv chat -c doc.prefill.amkv -p 'Who?' --max-tokens 2 --model "
    assert done.errors[1] == f"hint: say where it is now: {typed}FOLDER"
    assert amkv(*line, "--model", "elsewhere/my model").code == 0
    (here / "elsewhere" / "my model").rename(here / "elsewhere" / "model")
    (here / "doc.prefill.amkv").rename(here / "elsewhere" / "doc.prefill.amkv")  # both were moved
    line = ("chat", "-c", "elsewhere/doc.prefill.amkv", "-p", "Who?", "--max-tokens", "2")
    said = amkv(*line).errors[1].partition("say where it is now: amkv ")[2]
    assert shlex.split(said) == [*line, "--model", str(here / "elsewhere" / "model")]
    assert amkv(*shlex.split(said)).code == 0
    assert (
        amkv("compact", "elsewhere/doc.prefill.amkv")
        .errors[1]
        .endswith(f"amkv compact elsewhere/doc.prefill.amkv --model {here / 'elsewhere' / 'model'}")
    )


def test_a_model_folder_whose_files_have_changed(amkv: Amkv, here: Path) -> None:
    """`--model` is not what was wrong, and naming the same one again would not help."""
    shutil.copytree(pocket_folder(), here / "model")
    assert amkv("prefill", "doc.txt", "--model", "./model").code == 0
    other_weights(here / "model")
    done = amkv("chat", "-c", "doc.prefill.amkv", "-p", "Who?")
    assert done.code == 4
    assert "numbers differ, such as in model." in done.errors[0]
    assert "its files have changed since" in done.errors[1]
    assert f"amkv compact DOC --model {here / 'model'}" in done.errors[1]


def test_a_model_that_is_not_there(amkv: Amkv, compact: Path) -> None:
    done = amkv("verify", compact, "--model", "./nothing")
    assert done.code == 2
    assert "model folder nothing does not exist" in done.errors[0]


def test_diff_tells_fine_tunes_apart(amkv: Amkv, full: Path, here: Path) -> None:
    shutil.copytree(pocket_folder(), here / "model")
    other_weights(here / "model")
    assert amkv("prefill", "doc.txt", "--model", "./model", "-o", "tuned.amkv").code == 0
    assert amkv("prefill", "doc.txt", "--dtype", "bfloat16", "-o", "half.amkv").code == 0
    for path, same in (("tuned.amkv", False), ("half.amkv", True)):
        assert json.loads(amkv("diff", full, path, "--json").out)["same_model"] is same
