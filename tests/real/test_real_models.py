"""Pretrained models: keeping everything changes nothing, and a GGUF file is what was made of it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from amcli.generator.documents import generate
from amcli.models.calling import run
from amcli.models.generate import stream
from amcli.models.loading import LoadedModel, load
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.storage.artifacts import Artifact

QUESTION = "Name one of the people in this text, and say what is known about them."
ANSWER_TOKENS = 24

TOLERANCE = 2e-3
"""Of a logit, in float32: thirty layers add up their rounding."""


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def context(loaded: LoadedModel) -> Context:
    return prefill(loaded, Source("doc.txt", generate(5, 1600).text), chunk=150)


@pytest.fixture(scope="module")
def kept(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """The same from a compact file that keeps everything."""
    path = tmp_path_factory.mktemp("kept") / "keep.amkv"
    compact(context, Request(method="keep"), errors=False).save(path, overwrite=False)
    with Artifact.open(path) as artifact:
        assert artifact.kind == "compact"
        return restore(artifact, context.loaded)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def judge(folder: Path, request: pytest.FixtureRequest) -> PreTrainedModel:
    """Plain transformers, with nothing of amkv in it."""
    options = {"dtype": torch.float32, "attn_implementation": request.param}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def test_keeping_everything_gives_the_models_own_logits(
    kept: Context, judge: PreTrainedModel
) -> None:
    ids = kept.lead(QUESTION)
    assert kept.T > 300
    want = judge(torch.tensor([kept.ids + ids])).logits[0, kept.T :]
    cache = kept.cache.fork()
    got = run(kept.loaded.model, cache, torch.tensor([ids])).logits[0]
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    assert (want[-1].topk(2).values.diff().abs() > TOLERANCE).all()  # one can lead to another word


@torch.no_grad()
def test_keeping_everything_gives_the_models_own_answer(
    kept: Context, judge: PreTrainedModel
) -> None:
    ids = kept.lead(QUESTION)
    whole = torch.tensor([kept.ids + ids])
    stops = sorted(kept.loaded.chat.stop_ids)
    want = judge.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=ANSWER_TOKENS,
        do_sample=False, num_beams=1, repetition_penalty=1.0, eos_token_id=stops,
        pad_token_id=stops[0],
    )[0, whole.shape[1] :].tolist()  # fmt: skip
    got = list(stream(kept.loaded, kept.cache.fork(), ids, max_tokens=ANSWER_TOKENS))
    assert len(got) > 3
    assert got == [token for token in want if token not in stops]


@torch.no_grad()
def test_a_gguf_file_and_the_folder_made_of_it_are_one_model(
    name: str, folder: Path, file: Path
) -> None:
    """The folder has 16 bits, so that the weights agree in that type, to the last bit."""
    one = load(str(folder), device="cpu", dtype="bfloat16")
    two = load(str(file), device="cpu", dtype="bfloat16")
    mine, weights = one.fingerprint(), one.model.state_dict()
    found = two.differences(mine["model"], mine["tokenizer"])
    # Reading Qwen's folder, transformers adds a Unicode normalisation that the file does not have;
    # 5.17 makes another tokenizer of any file.
    if name == "smollm2" and not version("transformers").startswith("5.17."):
        assert found == []
    assert [line for line in found if not line.startswith("tokenizer: ")] == []
    assert sorted(two.model.state_dict()) == sorted(weights)
    for key, tensor in two.model.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    for loaded in (one, two):
        loaded.model.float()
    ids = one.chat.open_document(generate(6, 1200).text).ids
    assert two.chat.open_document(generate(6, 1200).text).ids == ids
    want, got = (m.model(torch.tensor([ids]), use_cache=False).logits for m in (one, two))
    assert torch.equal(got, want)
