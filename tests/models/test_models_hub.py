"""Every answer of the hub, faked where huggingface_hub sends its requests: one line and a hint."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tinymodels as tiny
import tinytokenizer as tt
import torch
from transformers import AutoModelForCausalLM

from amcli.errors import AmkvError, OutOfMemoryError, UsageError
from amcli.models import loading, memory, sources

# Whichever version of httpx huggingface_hub itself uses.
_http = importlib.import_module("huggingface_hub.utils._http")
httpx: Any = getattr(_http, "httpx2", None) or _http.httpx

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets what the hub answers to every request: a handler of requests, or status and headers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts

    def answers(handler: Callable[[Any], Any]) -> None:
        transport = httpx.MockTransport(handler)
        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=transport))

    yield answers
    huggingface_hub.set_client_factory(_http.default_client_factory)


CASES = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}, UsageError, "is gated", "hf auth login"),
    "not logged in": (401, {"X-Error-Code": "GatedRepo"}, UsageError, "is gated", "its terms at"),
    "missing": (404, {"X-Error-Code": "RepoNotFound"}, UsageError, "no model some", "private"),
    "revision": (
        404,
        {"X-Error-Code": "RevisionNotFound"},
        UsageError,
        "no revision v9",
        "leave it out: someone/model",
    ),
    "no config": (
        404,
        {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT},
        UsageError,
        "no config.json",
        "GGUF",
    ),
    "broken": (503, {}, AmkvError, "answered 503", "try again"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_hub_says(hub: Callable[..., None], case: str) -> None:
    status, headers, kind, message, hint = CASES[case]
    hub(lambda request: httpx.Response(status, headers=headers))
    with pytest.raises(AmkvError) as caught:
        loading.load("someone/model@v9", device="cpu")
    assert type(caught.value) is kind
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_hub_out_of_reach_is_one_line_and_no_chatter(
    hub: Callable[..., None], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def down(request: Any) -> None:
        raise httpx.ConnectError("no route to host")

    hub(down)
    with pytest.raises(AmkvError, match="the hub cannot be reached") as caught:
        loading.load("someone/model", device="cpu")
    assert caught.value.code == "hub-unreachable"
    assert "the folder of a model" in (caught.value.hint or "")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_offline_nothing_is_asked_for(
    hub: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: Any) -> None:
        raise AssertionError(f"asked for {request.url}")

    hub(refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AmkvError, match="HF_HUB_OFFLINE is set") as caught:
        loading.load("someone/model", device="cpu")
    assert "hf download someone/model" in (caught.value.hint or "")


@pytest.fixture
def served(tmp_path: Path, hub: Callable[..., None]) -> list[str]:
    """A hub that has the model someone/tiny; the paths of what it was asked for."""
    folder = tmp_path / "repository"
    AutoModelForCausalLM.from_config(tiny.config("qwen3", vocab_size=330)).save_pretrained(folder)
    tt.of("chatml").save_pretrained(folder)
    asked: list[str] = []

    def handler(request: Any) -> Any:
        path = request.url.path
        asked.append(f"{request.method} {path}")
        headers = {"X-Repo-Commit": COMMIT}
        if "/tree/" in path:
            listed = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT}
                for p in folder.iterdir()
            ]
            return httpx.Response(200, json=listed)
        if path.startswith("/api/models/someone/tiny"):
            files = [{"rfilename": p.name} for p in folder.iterdir()]
            return httpx.Response(
                200, json={"id": "someone/tiny", "sha": COMMIT, "siblings": files}
            )
        file = folder / path.rpartition("/")[2]
        if not path.startswith("/someone/tiny/resolve/") or not file.is_file():
            return httpx.Response(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        headers |= {"ETag": f'"{hash(data):x}"', "Content-Length": str(len(data))}
        if request.method == "HEAD":
            return httpx.Response(200, headers=headers)
        if (wanted := request.headers.get("Range")) is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1 if last else None]
        return httpx.Response(200, headers=headers, content=data)

    hub(handler)
    return asked


def test_a_hub_model_that_cannot_fit_is_not_downloaded(
    served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    with pytest.raises(OutOfMemoryError, match=r"someone/tiny needs .* and cpu has 10 kB free"):
        loading.load("someone/tiny", device="cpu")
    assert any("config.json" in path for path in served)
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    assert not list(cache.rglob("*.safetensors"))


def test_a_hub_model_is_sized_by_its_headers(served: list[str]) -> None:
    config = tiny.config("qwen3", vocab_size=330)
    with loading.quiet():
        need = memory.estimate("someone/tiny", None, config, torch.float32, [torch.device("cpu")])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert need.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_disk_that_is_full_while_downloading(
    hub: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "cached_file", full)
    with pytest.raises(OutOfMemoryError, match="no space left to download") as caught:
        loading.load("someone/model", device="cpu")
    assert "HF_HOME" in (caught.value.hint or "")


def test_code_of_a_model_runs_only_when_asked(tmp_path: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.MyConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise ZeroDivisionError('the code was run')")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="its own code") as caught:
        loading.load(str(tmp_path), device="cpu")
    assert (caught.value.code, caught.value.field) == ("model-brings-code", "trust_remote_code")
    assert "trust_remote_code=True" in (caught.value.hint or "")
    with pytest.raises(AmkvError, match="the code was run"):
        loading.load(str(tmp_path), device="cpu", trust_remote_code=True)
