"""import: caches of other tools become prefills that are as good as our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boxes
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

from amcli.commands.app import main
from amcli.models.calling import run
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.reading import prefill
from amcli.storage.artifacts import Artifact

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def own() -> Context:
    """What amkv itself makes of the document."""
    return prefill(boxes.model("llama"), boxes.source())


@pytest.fixture(scope="module")
def cache(own: Context) -> DynamicCache:
    """What plain transformers makes of the same tokens."""
    model = AutoModelForCausalLM.from_pretrained(own.loaded.id, dtype=torch.float32)
    cache = DynamicCache()
    with torch.no_grad():
        run(model, cache, torch.tensor([own.ids]))
    return cache


def named(cache: DynamicCache, keys: str, values: str) -> Tensors:
    pairs = enumerate(cache.layers)
    return {
        pattern.format(i=i): getattr(layer, part).contiguous()
        for i, layer in pairs
        for pattern, part in ((keys, "keys"), (values, "values"))
    }


FORMS: dict[str, tuple[str, str, dict[str, str]]] = {
    "transformers": ("{i}.keys", "{i}.values", {}),
    "older transformers": ("key_cache.{i}", "value_cache.{i}", {}),
    "exported": ("past_key_values.{i}.key", "past_key_values.{i}.value", {}),
    "mlx_lm": ("{i}.0", "{i}.1", {"1.model": "x", "2.0": "KVCache", "2.1": "KVCache"}),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").write_text(boxes.source().text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("form", FORMS)
def test_caches_of_other_tools(form: str, own: Context, cache: DynamicCache, here: Path) -> None:
    keys, values, metadata = FORMS[form]
    save_file(named(cache, keys, values), here / "cache.safetensors", metadata=metadata)
    words = ["import", "cache.safetensors", "--model", own.loaded.id, "--text", "doc.txt"]
    assert main([*words, "-q", "--dtype", "float32"]) == 0
    with Artifact.open(here / "cache.prefill.amkv") as artifact:
        assert artifact.kind == "prefill"
        assert artifact.token_ids() == own.ids
        assert artifact.manifest["boundary"] == own.boundary
        assert artifact.manifest["document_start"] == own.document_start
        assert artifact.manifest["source"]["sha256"] == own.source["sha256"]
        for i in range(len(artifact.layers)):
            mine, _ = own.cache.live(i)
            torch.testing.assert_close(
                artifact.heads(i).keys.unpack(), mine[0].flatten(0, 1), atol=1e-4, rtol=1e-4
            )
    assert main(["compact", "cache.prefill.amkv", "--ratio", "4", "-q"]) == 0


def test_token_ids_instead_of_a_text(own: Context, cache: DynamicCache, here: Path) -> None:
    save_file(named(cache, "{i}.keys", "{i}.values"), here / "c.safetensors")
    (here / "ids.json").write_text(json.dumps(own.ids), encoding="utf-8")
    words = ["import", "c.safetensors", "--model", own.loaded.id, "--ids", "ids.json", "-q"]
    assert main(words) == 0
    with Artifact.open(here / "c.prefill.amkv") as artifact:
        assert artifact.token_ids() == own.ids
        assert artifact.manifest["boundary"] == "raw"


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def shorter(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name] = tensors[name][:, :, 1:].contiguous()


def noise(tensors: Tensors) -> None:
    tensors["1.keys"] = torch.randn_like(tensors["1.keys"])


def heads(tensors: Tensors) -> None:
    tensors["0.keys"] = tensors["0.keys"][:, :1].contiguous()


def fewer(tensors: Tensors) -> None:
    last = max(int(name.partition(".")[0]) for name in tensors)
    del tensors[f"{last}.keys"], tensors[f"{last}.values"]


def extra(tensors: Tensors) -> None:
    tensors["optimizer"] = torch.zeros(1)


def codes(tensors: Tensors) -> None:
    tensors["0.keys"] = tensors["0.keys"].to(torch.int8)


WRONG: dict[str, tuple[Callable[[Tensors], Any], int, str]] = {
    "a layer without values": (drop("0.values"), 2, "keys and values of layers 0, 1"),
    "another length": (shorter, 2, "tokens, the ids are"),
    "other numbers": (noise, 4, "keys of layer 1 differ by"),
    "other heads": (heads, 4, "layer 0 of c.safetensors has 1 heads"),
    "fewer layers": (fewer, 4, "layers, "),
    "something else": (extra, 2, "'optimizer', which is no layer's"),
    "codes": (codes, 2, "0.keys of c.safetensors is int8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(
    case: str,
    own: Context,
    cache: DynamicCache,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, code, message = WRONG[case]
    tensors = named(cache, "{i}.keys", "{i}.values")
    change(tensors)
    save_file(tensors, here / "c.safetensors")
    words = ["import", "c.safetensors", "--model", own.loaded.id, "--text", "doc.txt", "-q"]
    assert main(words) == code
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in errors] == ["error", "hint"]
    assert message in errors[0]
    assert sorted(path.name for path in here.iterdir()) == ["c.safetensors", "doc.txt"]


MISSING: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": (("--text", "doc.txt"), "no model was named"),
    "nothing read": (("--model", "pocket"), "one of --text and --ids is needed"),
    "both": (("--model", "pocket", "--text", "doc.txt", "--ids", "x"), "one of --text and --ids"),
    "no such ids": (("--model", "pocket", "--ids", "no.json"), "no such file: no.json"),
    "ids that are none": (("--model", "pocket", "--ids", "doc.txt"), "doc.txt is not JSON"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_asked_for(
    case: str, cache: DynamicCache, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = MISSING[case]
    save_file(named(cache, "{i}.keys", "{i}.values"), here / "c.safetensors")
    assert main(["import", "c.safetensors", *words, "-q"]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_no_caches(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "pocket", "--text", "doc.txt", "-q"]
    assert main(["import", "doc.txt", *words]) == 2
    assert "doc.txt is not a safetensors file" in capsys.readouterr().err
    assert main(["import", "no.safetensors", *words]) == 2
    assert "no such file: no.safetensors" in capsys.readouterr().err
    save_file({"0.0": torch.zeros(1, 1, 2, 4), "0.1": torch.zeros(1, 1, 2, 4)},
              here / "r.safetensors", metadata={"2.0": "RotatingKVCache"})  # fmt: skip
    assert main(["import", "r.safetensors", *words]) == 2
    assert "holds a RotatingKVCache" in capsys.readouterr().err
