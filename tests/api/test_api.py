"""The Python API: what its page shows, run as it stands there, and what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import boxes
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import amcli
from amcli.commands.app import main
from amcli.errors import ArtifactError, ModelMismatchError, UsageError
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.reading import prefill, save_prefill
from amcli.pipeline.talk.session import Session
from amcli.pocket import folder

PAGE = (Path(__file__).parents[2] / "docs" / "python-api.md").read_text(encoding="utf-8")
QUESTION = "Who wrote this?"


def code(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact context of pocket's, `doc.amkv` in a folder of its own."""
    context = prefill(boxes.model("pocket"), boxes.source(150))
    made = compact(context, Request(ratio=3, method="highest-attention"), errors=False)
    path = tmp_path_factory.mktemp("api") / "doc.amkv"
    made.save(path, overwrite=False)
    return path


@pytest.fixture
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder()), dtype=torch.float32)


def test_the_page_as_it_stands(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(artifact.parent)
    exec(compile(code("script") + code("more"), "docs/python-api.md", "exec"), {})
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert main(["chat", "-c", "doc.amkv", "-p", QUESTION, "-q"]) == 0
    answer = capsys.readouterr().out.strip()
    assert answer
    assert first == answer
    assert second.strip() == answer[: len(second.strip())]
    assert third.strip() == answer


@pytest.mark.parametrize("kind", ["prefill", "compact"])
def test_beams_and_several_sequences(kind: str, tmp_path: Path, model: Any) -> None:
    """As plain transformers gives them, which reads the whole document."""
    context = prefill(boxes.model("pocket"), boxes.source(150))
    path = tmp_path / "doc.amkv"
    if kind == "prefill":
        save_prefill(context, path, overwrite=False)
    else:
        whole = compact(context, Request(method="keep", store="native"), errors=False)
        whole.save(path, overwrite=False)
    own = AutoModelForCausalLM.from_pretrained(str(folder()), dtype=torch.float32)
    attached = amcli.load(path).attach(own)
    for options in (
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True},
    ):
        torch.manual_seed(0)
        inputs = attached.inputs(QUESTION)
        got = own.generate(**inputs, **options, max_new_tokens=12)
        torch.manual_seed(0)
        plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        want = model.generate(**plain, **options, max_new_tokens=12)
        assert got.tolist() == want.tolist()
    attached.detach()


def test_an_error_by_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("import amcli\n" + code("errors"), "docs/python-api.md", "exec"), {})
    assert capsys.readouterr().out == "no such file: missing.amkv; check the path\n"


def test_importing_it_is_cheap() -> None:
    script = "import sys, amcli; sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_what_a_document_says_of_itself(artifact: Path) -> None:
    with amcli.load(artifact) as document:
        assert document.kind == "compact"
        assert document.ratio == pytest.approx(document.manifest["ratio"], rel=0.01)
        assert document.tokens == document.manifest["logical_length"]
        assert document.model == "pocket"
        assert str(artifact) in repr(document)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_families_answer_as_they_do_in_a_session(name: str, tmp_path: Path) -> None:
    loaded = boxes.model(name)
    made = compact(prefill(loaded, boxes.source()), Request(ratio=2), errors=False)
    made.save(tmp_path / "f.amkv", overwrite=False)
    model = AutoModelForCausalLM.from_pretrained(loaded.id, dtype=torch.float32)
    before = model.config._attn_implementation
    context = amcli.load(tmp_path / "f.amkv").attach(model)
    made.apply()
    wanted = "".join(Session(made.context, max_tokens=12).ask(QUESTION)).strip()
    assert context.generate(QUESTION, max_tokens=12) == wanted
    assert "".join(context.stream(QUESTION, max_tokens=12)).strip() == wanted
    context.detach()
    assert model.config._attn_implementation == before


def test_other_calls_of_the_model_are_as_before(artifact: Path, model: Any) -> None:
    ids = torch.randint(3, 4000, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        context = amcli.load(artifact).attach(model)
        torch.testing.assert_close(model(input_ids=ids).logits, before, atol=2e-4, rtol=1e-4)
        context.detach()
        assert torch.equal(model(input_ids=ids).logits, before)


def test_contexts_of_one_model_do_not_disturb_each_other(artifact: Path, model: Any) -> None:
    one, other = (amcli.load(artifact).attach(model) for _ in range(2))
    answer = one.generate(QUESTION, max_tokens=8)
    assert other.generate("What is this?", max_tokens=8) is not None
    conversation = other.chat(max_tokens=8)
    assert "".join(conversation.ask(QUESTION)).strip() == answer
    assert one.generate(QUESTION, max_tokens=8) == answer
    one.detach()
    other.detach()
    assert model.config._attn_implementation != "amkv"


def test_a_model_in_another_dtype(artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(folder()), dtype=torch.bfloat16)
    context = amcli.load(artifact).attach(model)
    assert context.generate(QUESTION, max_tokens=8)
    assert context.context.loaded.dtype == torch.bfloat16


def test_another_model_is_refused_and_left_as_it_was(artifact: Path) -> None:
    loaded = boxes.model("llama")
    model = AutoModelForCausalLM.from_pretrained(loaded.id)
    before = model.config._attn_implementation
    with pytest.raises(ModelMismatchError, match="architecture: file Qwen3ForCausalLM") as caught:
        amcli.load(artifact).attach(model)
    assert (caught.value.code, caught.value.field) == ("wrong-model", "model")
    assert caught.value.facts["wanted"] == "pocket"
    assert caught.value.hint == ("use the model pocket, or compact the document again for this one")
    assert model.config._attn_implementation == before


def test_another_tokenizer_is_refused(artifact: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(folder()))
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelMismatchError, match="tokenizer: file sha256"):
        amcli.load(artifact).attach(model, tokenizer)


def test_what_cannot_be_used(artifact: Path, tmp_path: Path, model: Any) -> None:
    with pytest.raises(UsageError, match="no such file"):
        amcli.load(tmp_path / "no.amkv")
    (tmp_path / "f.amkv").write_bytes(b"nothing at all")
    with pytest.raises(ArtifactError, match="is not a valid"):
        amcli.load(tmp_path / "f.amkv")
    with pytest.raises(UsageError, match="Linear is not a transformers model"):
        amcli.load(artifact).attach(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    model.config.name_or_path = ""
    model.name_or_path = str(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no tokenizer was found"):
        amcli.load(artifact).attach(model)
    with pytest.raises(UsageError, match="the question is empty"):
        amcli.load(artifact).attach(model, boxes.model("pocket").tokenizer).generate(" ")
