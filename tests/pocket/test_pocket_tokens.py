"""The tokenizer loses nothing, and training sequences are what the chat template renders."""

from __future__ import annotations

import hashlib
from itertools import islice
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pocketbox import sampler, tokenizer
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

from amcli.generator.dialogues import Turn, turns
from amcli.generator.documents import blocks, cut, generate
from amcli.generator.tokens import CHAT_TEMPLATE, END, PAD, START, VOCABULARY, corpus, special_id
from amcli.generator.tokens import Sampler as AnySampler

SPECIAL = {PAD: 0, START: 1, END: 2}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
@example("<|im_start|>user\n<|im_end|><|endoftext|>")
@example("  tabs\t\tand \r\n\r\n\n lines \u2028 \u00a0 \U0001f600 e\u0301 \x00 ")
def test_any_text_survives_a_round_trip(text: str) -> None:
    ids = sampler().encode(text)
    assert sampler().tokenizer.decode(ids, skip_special_tokens=False) == text
    assert set(ids).isdisjoint(SPECIAL.values())
    split = tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert split == ids
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


def test_the_vocabulary_is_whole() -> None:
    assert len(tokenizer()) == VOCABULARY
    assert {token: tokenizer().convert_tokens_to_ids(token) for token in SPECIAL} == SPECIAL
    assert (tokenizer().eos_token, tokenizer().pad_token) == (END, PAD)
    with pytest.raises(ValueError, match="no token"):
        special_id(Tokenizer(tokenizer_models.BPE()), START)


def test_a_sampler_leaves_the_tokenizer_it_was_given_alone() -> None:
    raw = Tokenizer.from_str(sampler().tokenizer.to_str())
    AnySampler(raw)
    assert raw.encode(END, add_special_tokens=False).ids == [2]


def test_codes_are_the_same_tokens_wherever_they_stand() -> None:
    code = sampler().encode("43-49")
    assert len(code) == 3
    for text in ("code 43-49.", "Code 43-49 was issued", "43-49"):
        ids = sampler().encode(text)
        assert any(ids[i : i + 3] == code for i in range(len(ids)))


@pytest.mark.parametrize("seed", range(6))
def test_a_document_costs_what_its_blocks_cost(seed: int) -> None:
    tokens = 700 + 200 * seed
    document = generate(seed, tokens, sampler().measure, len(sampler().blank))
    used = len(sampler().encode(document.text))
    assert tokens - 400 < used <= tokens
    parts = sampler().measure(document.text.split("\n\n"))
    assert used == sum(parts) + (len(parts) - 1) * len(sampler().blank)


def rendered(document: str, said: list[Turn]) -> list[int]:
    messages = []
    for index, turn in enumerate(said):
        user = "\n\n".join(filter(None, [document, turn.user])) if index == 0 else turn.user
        messages += [
            {"role": "user", "content": user},
            {"role": "assistant", "content": turn.assistant},
        ]
    text = tokenizer().apply_chat_template(messages, tokenize=False)
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("seed", range(12))
def test_a_dialogue_is_assembled_as_the_template_renders_it(seed: int) -> None:
    rng = Random(seed)
    document = cut(blocks(rng), 500, sampler().measure)
    said = list(islice(turns(document, rng), 8))
    sample = sampler().assemble(sampler().encode(document.text), said, 10**6)
    assert sample.ids == rendered(document.text, said)
    assert len(sample.answers) == len(said)
    for (kind, first, last), turn in zip(sample.answers, said, strict=True):
        assert sampler().tokenizer.decode(sample.ids[first : last - 1]) == turn.assistant
        assert sample.ids[last - 1] == SPECIAL[END]
        assert kind == turn.kind
        assert set(sample.weights[first:last]) == {turn.weight}


def test_the_document_may_have_a_turn_of_its_own() -> None:
    said = [Turn("", "Noted.", 1.0, "read"), Turn("Who?", "Ann.", 16.0, "direct")]
    sample = sampler().assemble(sampler().encode("Ann came."), said, 10**6)
    assert sample.ids == rendered("Ann came.", said)


def test_the_generation_prompt_leads_to_the_answer() -> None:
    text = tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer().chat_template == CHAT_TEMPLATE


def test_what_is_cut_off_is_no_answer() -> None:
    said = [Turn("Who?", "Ann.", 16.0, "direct"), Turn("Where?", "In Oban.", 16.0, "direct")]
    body = sampler().encode("Ann came.")
    whole = sampler().assemble(body, said, 10**6)
    short = sampler().assemble(body, said, len(whole.ids) - 1)
    assert short.ids == whole.ids[:-1]
    assert short.answers == whole.answers[:1]


def test_only_documents_and_answers_are_learned() -> None:
    said = [Turn("Who?", "Ann.", 16.0, "direct")]
    body = sampler().encode("Ann came.")
    sample = sampler().assemble(body, said, 10**6)
    opened = len(sampler().open_user)
    learned = [w for w in sample.weights if w]
    assert learned == [1.0] * len(body) + [16.0] * (len(sampler().encode("Ann.")) + 1)
    assert sample.weights[:opened] == [0.0] * opened


@pytest.mark.parametrize("length", [256, 1024])
def test_samples_keep_to_their_length_and_cover_every_task(length: int) -> None:
    kinds = set()
    for index in range(60):
        sample = sampler().sample(f"test/{index}", length)
        assert 0 < len(sample.ids) <= length
        assert len(sample.weights) == len(sample.ids)
        assert all(first < last <= len(sample.ids) for _, first, last in sample.answers)
        kinds |= {kind for kind, _, _ in sample.answers}
    assert {"direct", "reverse", "two-hop", "repeat"} <= kinds


def test_the_training_stream_is_the_one_that_pocket_saw() -> None:
    # A change here means that `python -m amcli.trainer.train` no longer makes the published model.
    digest = hashlib.sha256()
    for index in range(20):
        sample = sampler().sample(f"train/0/{index}/0", 1024)
        digest.update(repr((sample.ids, sample.weights, sample.answers)).encode())
    for text in corpus(0, 4):
        digest.update(text.encode())
    assert digest.hexdigest() == STREAM


STREAM = "14a79e5c27839fa3d23e05f57eff685839509ccac49664d3d62a0b82fc57d292"
