"""export: plain transformers answers from the folder as amkv does from the file."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import boxes
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from amcli.commands.app import main
from amcli.models.calling import GENERATE
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.talk.session import Session
from amcli.pocket import folder as pocket_folder

PAGE = Path(__file__).parents[2] / "docs" / "conversions.md"
LOADER = Path(__file__).parents[2] / "amcli" / "conversions" / "loader.py"
QUESTION = "Who is it?"


def loader(folder: Path) -> Any:
    """The loader of an exported folder, imported from there."""
    spec = importlib.util.spec_from_file_location("exported_loader", folder / "loader.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = {
    "biases, ragged heads": ("pocket", Request(ratio=6, method="omp", store="native")),
    "codes": ("pocket", Request(ratio=20, store="int4")),
    "packed": ("pocket", Request(ratio=20, store="k4v3")),
    "mixed": ("pocket", Request(ratio=20, store={0: "k8v8", 1: "int4", 2: "k3v2"})),
    "whole": ("llama", Request(method="keep")),
    "another family": ("qwen3", Request(ratio=4, method="omp", store="int8")),
}


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_goes_on_as_we_do(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options = CASES[case]
    loaded = boxes.model(name)
    made = compact(prefill(loaded, boxes.source()), options, errors=False)
    made.save(tmp_path / "f.amkv", overwrite=False)
    assert main(["export", str(tmp_path / "f.amkv"), "-o", str(tmp_path / "out"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    made.apply()
    session = Session(made.context, max_tokens=12)
    wanted = "".join(session.ask(QUESTION))

    location = str(pocket_folder()) if name == "pocket" else loaded.id
    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    ids, cache = loader(tmp_path / "out").load(tmp_path / "out", model)
    prompt = torch.tensor([loaded.chat.first_turn(QUESTION)])
    inputs = torch.cat([ids, prompt], dim=1)
    stops = sorted(loaded.chat.stop_ids)
    found = model.generate(
        inputs, **{GENERATE: cache}, max_new_tokens=12, do_sample=False, eos_token_id=stops
    )[0, inputs.shape[1] :]
    text = loaded.tokenizer.decode(found, skip_special_tokens=True)
    assert text.strip() == wanted.strip()

    heads = [t for layer in made.layers for t in layer.lengths]
    assert record["entries"] == sum(heads)
    tensors = load_file(tmp_path / "out" / "cache.safetensors")
    padded = sum(x.nbytes for n, x in tensors.items() if n != "ids")
    assert record["padded_bytes"] == padded
    slots = sum(len(x.lengths) * max(x.lengths) for x in made.layers)
    assert record["padding"] == pytest.approx(1 - sum(heads) / slots, abs=1e-4)


def test_the_loader_on_the_page_is_the_one_in_the_folder() -> None:
    assert LOADER.read_text(encoding="utf-8") in PAGE.read_text(encoding="utf-8")


def test_the_loader_needs_torch_and_transformers_only() -> None:
    found = set()
    for node in ast.walk(ast.parse(LOADER.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    assert found == {"pathlib", "torch", "transformers", "safetensors"}


def example() -> str:
    """The script of the page that uses an exported folder."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"<!-- script -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1].replace("cache=cache,", f"{GENERATE}=cache,")


def test_the_script_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = prefill(boxes.model("pocket"), boxes.source(150))
    made = compact(context, Request(ratio=3, method="highest-attention"), errors=False)
    made.save(tmp_path / "doc.amkv", overwrite=False)
    monkeypatch.chdir(tmp_path)
    assert main(["export", "doc.amkv", "-q"]) == 0
    monkeypatch.syspath_prepend(str(tmp_path / "doc.transformers"))
    capsys.readouterr()
    exec(compile(example(), str(PAGE), "exec"), {})
    monkeypatch.delitem(sys.modules, "loader")
    printed = capsys.readouterr().out.strip()
    assert main(["chat", "-c", "doc.amkv", "-p", "Who wrote this?", "-q"]) == 0
    assert printed == capsys.readouterr().out.strip()


def test_what_cannot_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    context = prefill(boxes.model("gemma3_text"), boxes.source())
    compact(context, Request(ratio=2), errors=False).save(tmp_path / "f.amkv", overwrite=False)
    assert main(["export", "f.amkv"]) == 2
    assert "f.amkv has sliding-window layers" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.amkv"]
    (tmp_path / "f.transformers").mkdir()
    assert main(["export", "f.amkv"]) == 2
    assert "f.transformers already exists" in capsys.readouterr().err
    assert main(["export", "f.amkv", "--to", "gguf"]) == 2
    assert "unknown form 'gguf'" in capsys.readouterr().err
    assert main(["export", "f.amkv", "-o", "no/such"]) == 2
    assert "does not exist" in capsys.readouterr().err
