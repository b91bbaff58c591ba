"""Training: the plan, the loss, and that a run can be cut off, resumed and published.

Whole runs and other architectures are tried on the tiny preset.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pocketbox import sampler
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from amcli.generator.dialogues import QUESTION_KINDS
from amcli.models.loading import load
from amcli.pocket import folder
from amcli.trainer import train
from amcli.trainer.train import DECAY, PRESETS, Batches, Run, arguments, learning_rate

POCKET = PRESETS["pocket"]
STEPS = POCKET.tokens // POCKET.step_tokens


def test_the_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    rates = [learning_rate(POCKET, step, STEPS) for step in range(STEPS + 1)]
    warm, fall = POCKET.warmup_steps, math.ceil(STEPS * (1 - DECAY))
    assert rates[0] == pytest.approx(1.5e-3 / warm)
    assert rates[:warm] == sorted(rates[:warm])
    assert set(rates[warm - 1 : fall]) == {1.5e-3}
    assert rates[fall + 1 :] == sorted(rates[fall + 1 :], reverse=True)
    steps_down = [a - b for a, b in zip(rates[fall + 1 : -1], rates[fall + 2 :], strict=True)]
    assert max(steps_down) == pytest.approx(min(steps_down))
    assert rates[STEPS] == 0


def test_a_longer_plan_changes_nothing_before_the_fall() -> None:
    for step in range(0, int(STEPS * (1 - DECAY)), 97):
        assert learning_rate(POCKET, step, STEPS) == learning_rate(POCKET, step, 2 * STEPS)


def test_sequences_grow_stage_by_stage() -> None:
    seen: dict[float, set[int]] = {until: set() for until, _ in POCKET.stages}
    for step in range(0, STEPS, 7):
        until = next(u for u in seen if step * POCKET.step_tokens < u)
        seen[until].add(train.sequence_length(POCKET, 0, step))
    assert list(seen.values()) == [{1024}, {1024, 4096}, {1024, 4096, 10240}]


def test_a_batch_depends_on_the_seed_and_the_step_alone() -> None:
    file = str(folder() / "tokenizer.json")
    ids, weights = Batches(PRESETS["tiny"], file, 0, 9, first=0)[4]
    again, weights_again = Batches(PRESETS["tiny"], file, 0, 9, first=3)[1]
    other, _ = Batches(PRESETS["tiny"], file, 1, 9, first=0)[4]
    assert torch.equal(ids, again)
    assert torch.equal(weights, weights_again)
    assert ids.shape != other.shape or not torch.equal(ids, other)
    assert ids.numel() == PRESETS["tiny"].step_tokens
    assert not weights[ids == 0].any()  # padding is not learned
    assert 16 in weights.unique().tolist()


def test_the_loss_is_the_weighted_mean_of_the_next_tokens() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    weights = torch.tensor([[9, 1, 0, 16, 2], [5, 0, 0, 0, 3]], dtype=torch.uint8)
    total, weight = 0.0, 0.0
    for b in range(2):
        for j in range(1, 5):
            logp = logits[b, j - 1].double().log_softmax(-1)[ids[b, j]]
            total -= float(weights[b, j]) * float(logp)
            weight += float(weights[b, j])
    loss = train.weighted_loss(logits, ids, weights)
    assert float(loss) == pytest.approx(total / weight, rel=1e-5)
    assert float(train.weighted_loss(logits, ids, torch.zeros_like(weights))) == 0


@pytest.mark.parametrize("slips", [False, True])
def test_recall_counts_answers_that_are_whole(slips: bool) -> None:
    def oracle(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        """Predicts every next token, but forgets to end an answer when it slips."""
        following = input_ids.roll(-1, 1)
        if slips:
            following = following.masked_fill(following == sampler().end, 5)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 4096).float())

    found = train.recall(oracle, sampler(), 600, 4, "cpu")  # type: ignore[arg-type]
    assert found == dict.fromkeys(QUESTION_KINDS, 0.0 if slips else 1.0)


# ---- whole runs of the tiny preset ---------------------------------------------------------------

PLAN = ["--preset", "tiny", "--tokens", str(4 * 2048), "--workers", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, through the command line."""
    out = tmp_path_factory.mktemp("run")
    train.main([*PLAN, "--out", str(out), "--evaluate", "2"])
    return out


def test_a_run_writes_a_model_that_loads(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    trained = torch.load(finished / "checkpoint.pt")["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name].to(torch.bfloat16)), name
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]


def test_a_run_logs_its_recall_and_its_end(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    measured = [(row["step"], row["length"]) for row in rows if "recall" in row]
    assert measured == [(s, n) for s in (2, 4, 4) for n in (256, 512)]
    assert rows[-1] == {"step": 4, "steps": 4, "complete": True}


def test_a_resumed_run_equals_an_uninterrupted_one(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "tokenizer-raw.json", tmp_path)
    done, steps = False, 0
    while not done:  # no minutes at all: one step, then a checkpoint
        run = Run(arguments([*PLAN, "--out", str(tmp_path), "--minutes", "0", "--resume"]))
        run.prepare()
        done = run.train()
        run.save_checkpoint()
        steps += 1
    assert steps == 4
    whole, parts = (torch.load(path / "checkpoint.pt") for path in (finished, tmp_path))
    assert whole["step"] == parts["step"] == 4
    assert whole["model"].keys() == parts["model"].keys()
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def test_training_changes_every_weight(finished: Path) -> None:
    run = Run(arguments([*PLAN, "--out", str(finished)]))
    run.prepare()
    trained = torch.load(finished / "checkpoint.pt")["model"]
    for name, value in run.model.state_dict().items():
        assert not torch.equal(value, trained[name]), name


# ---- the other models of this kind ---------------------------------------------------------------

SHAPES = {  # architecture, parameters, layers, KV heads, queries a layer
    "pocket": ("Qwen3ForCausalLM", 11_313_408, 9, 2, 8 * 64),
    "llama": ("LlamaForCausalLM", 9_312_512, 12, 4, 8 * 64),
    "olmo2": ("Olmo2ForCausalLM", 9_841_536, 7, 6, 6 * 64),
    "tiny": ("Qwen3ForCausalLM", 410_176, 2, 2, 4 * 64),
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_builds_the_shape_it_says(name: str) -> None:
    with torch.device("meta"):
        model = train.build(PRESETS[name], 4096)
    layer = model.model.layers[0].self_attn
    found = (
        type(model).__name__,
        sum(p.numel() for p in model.parameters()),
        len(model.model.layers),
        layer.k_proj.out_features // 64,
        layer.q_proj.out_features,
    )
    assert found == SHAPES[name]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.padding_idx is None  # every token of ours learns
    assert model.config.max_position_embeddings == 16384
    assert model.config.rope_parameters["rope_theta"] == 100_000


def test_pocket_still_has_the_shape_of_its_weights() -> None:
    published = AutoConfig.from_pretrained(folder()).to_dict()
    with torch.device("meta"):
        built = train.build(POCKET, published["vocab_size"]).config.to_dict()
    written = ("architectures", "dtype", "eos_token_id", "pad_token_id", "transformers_version")
    for name in (*written, "_name_or_path"):
        published.pop(name, None)
        built.pop(name, None)
    assert built == published


@pytest.mark.parametrize("arch", ["llama", "olmo2"])
def test_other_architectures_learn_and_are_published(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], arch=arch, warmup_steps=5))
    shutil.copy(folder() / "tokenizer.json", tmp_path / "tokenizer-raw.json")
    run = Run(arguments([*PLAN, "--out", str(tmp_path)]))
    run.prepare()
    ids, weights = next(iter(run.batches()))
    steps = [run.optimize(ids, weights, train.weighted_loss, 3e-3) for _ in range(4)]
    losses = [float(loss.detach()) for loss in steps]
    assert losses == sorted(losses, reverse=True)
    run.publish()
    loaded = load(str(tmp_path / "model"))
    assert loaded.model.config.model_type == arch
    assert loaded.tokenizer_hash == load("pocket").tokenizer_hash
    assert loaded.geometry.layers[0].kv_heads == PRESETS["tiny"].kv_heads


# ---- a plan by the clock -------------------------------------------------------------------------


def test_the_rate_falls_by_the_clock_when_time_is_scarcer() -> None:
    rates = [learning_rate(POCKET, 500, STEPS, clock) for clock in (0.0, 0.75, 0.875, 1.0)]
    assert rates == pytest.approx([1.5e-3, 1.5e-3, 0.75e-3, 0])
    late = int(STEPS * 0.9)  # here the steps are scarcer
    assert learning_rate(POCKET, late, STEPS, 0.5) == learning_rate(POCKET, late, STEPS)


def test_a_run_out_of_time_is_complete(tmp_path: Path, finished: Path) -> None:
    shutil.copy(finished / "tokenizer-raw.json", tmp_path)
    run = Run(arguments([*PLAN, "--out", str(tmp_path), "--seconds", "1e-9"]))
    run.prepare()
    assert run.train()
    assert run.step == 0
