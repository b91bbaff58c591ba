"""Several contexts as one: exact where the RoPE allows it, refused by name where it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import families
import pytest
import tinymodels as tiny
import torch
from boxes import model

from amcli.entries.ragged import Entries, appended
from amcli.entries.stores import quantizer_of
from amcli.errors import UsageError
from amcli.generator.dialogues import Questioner
from amcli.generator.documents import generate
from amcli.models.cache import CompactCache
from amcli.models.loading import LoadedModel, load
from amcli.models.replies import answers
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.joining import join
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill, save_prefill
from amcli.pipeline.contexts.source import Source
from amcli.storage.artifacts import Artifact

QUESTION = 9
EXACT = [
    "llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "glm4", "cohere2", "exaone4",
    "gpt_oss", "stablelm", "smollm3",
]  # fmt: skip


def contexts(loaded: LoadedModel, *lengths: int) -> list[Context]:
    return [
        prefill(loaded, Source(f"{n}.txt", " ".join(f"w{n}{i}" for i in range(n)))) for n in lengths
    ]


def logits(context: Context, cache: CompactCache, question: torch.Tensor) -> torch.Tensor:
    return tiny.logits(context.loaded.model, question, cache.fork())


def read_in_place(parts: list[Context]) -> CompactCache:
    """What joining is to give: each text read by itself, at the positions where it ends up.

    The model attends within one text, and the tokens of all of them stay in the cache.
    """
    loaded = parts[0].loaded
    kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in loaded.geometry.layers]
    start = 0
    for part in parts:
        alone = CompactCache.empty(loaded.geometry)
        places = torch.arange(start, start + part.T).unsqueeze(0)
        ids = torch.tensor([part.ids])
        tiny.logits(loaded.model, ids, alone, position_ids=places)
        for i in range(len(kept)):
            keys, values = alone.live(i)
            kept[i].append((keys[0], values[0]))
        start += part.T
    cache = CompactCache.empty(loaded.geometry)
    for i, found in enumerate(kept):
        keys, values = (torch.cat(x, dim=1) for x in zip(*found, strict=True))
        window = loaded.geometry.layers[i].window
        reach = keys.shape[1] if window is None else min(window - 1, keys.shape[1])
        cache.set_live(i, keys[:, -reach:], values[:, -reach:], start)
    return cache


@pytest.mark.parametrize("name", EXACT)
def test_full_contexts_are_as_if_each_had_been_read_in_its_place(name: str) -> None:
    loaded = families.loaded(name)
    # A text shorter than the window of the tiny models stands last, and one in the middle.
    parts = contexts(loaded, 20, 2, 30, 3)
    joined = join(parts)
    assert joined.T == joined.cache.get_seq_length() == sum(part.T for part in parts)
    assert joined.ids == [token for part in parts for token in part.ids]
    question = torch.tensor([loaded.chat.first_turn("Who?")[:QUESTION]])
    want = logits(joined, read_in_place(parts), question)
    got = logits(joined, joined.cache, question)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
    other = logits(joined, join(parts[1:]).cache, question)
    assert not torch.allclose(other, want, atol=1e-3)


def test_one_context_is_itself() -> None:
    (only,) = contexts(model("llama"), 12)
    assert join([only]) is only


@pytest.mark.parametrize("store", ["native", "int8", "int4", "k4v4", "k8v3"])
def test_compact_contexts_through_files(store: str, tmp_path: Path) -> None:
    """A compact one behind a full one, with codes or numbers, from files as chat reads them."""
    loaded = model("qwen3")
    first, second = contexts(loaded, 40, 60)
    options = Request(ratio=2, method="omp", queries="context", store=store)
    found = compact(second, options)
    save_prefill(first, tmp_path / "a.amkv", overwrite=False)
    found.save(tmp_path / "b.amkv", overwrite=False)
    read = []
    for name in ("b.amkv", "a.amkv", "b.amkv"):
        with Artifact.open(tmp_path / name) as artifact:
            read.append(restore(artifact, loaded))
    one, two, again = read
    question = torch.tensor([loaded.chat.first_turn("Who?")[:QUESTION]])
    full = logits(first, join([second, first, second]).cache, question)
    got = logits(first, join([one, two, again]).cache, question)
    spread = float(full.std())
    assert float((got - full).std()) < (0.2 if store in ("native", "int8") else 0.4) * spread
    # Two of one store stay codes, and cost what both cost.
    both = join([one, again])
    prefix = both.cache.attention[0].prefix
    assert prefix is not None
    assert type(prefix) is type(one.cache.attention[0].prefix)
    assert both.cache.nbytes() == one.cache.nbytes() + again.cache.nbytes()


def test_codes_are_rounded_once_more_and_no_further() -> None:
    loaded = model("qwen3")
    (context,) = contexts(loaded, 60)
    compacted = compact(context, Request(ratio=3, method="omp", queries="context", store="int8"))
    compacted.apply()
    joined = join([context, context])
    layer = joined.cache.attention[0].prefix
    assert layer is not None
    native = compacted.layers[0].unpack()
    for h, (keys, values, _) in enumerate(layer.unpack().heads()):
        t = native.lengths[h]
        assert torch.equal(keys[:t], list(native.heads())[h][0])
        assert torch.equal(values[t:], list(native.heads())[h][1])
        assert float(keys[t:].norm()) == pytest.approx(float(keys[:t].norm()), rel=0.01)


def test_entries_head_by_head() -> None:
    generator = torch.Generator().manual_seed(0)

    def heads(*lengths: int, beta: bool) -> Entries:
        rows = sum(lengths)
        keys, values = (torch.randn(rows, 8, generator=generator) for _ in range(2))
        return Entries.of(keys, values, torch.randn(rows) if beta else None, lengths)

    a, b = heads(3, 0, 2, beta=True), heads(1, 4, 0, beta=False)
    both = appended([a, b], torch.float32)
    assert both.lengths == (4, 4, 2)
    for (k, v, beta), (ka, va, _), (kb, vb, _) in zip(
        both.heads(), a.heads(), b.heads(), strict=True
    ):
        assert torch.equal(k, torch.cat([ka, kb]))
        assert torch.equal(v, torch.cat([va, vb]))
        assert beta is not None
        assert bool((beta[len(ka) :] == 0).all())
    mixed = appended([quantizer_of("int4").pack(a), b], torch.bfloat16)
    assert mixed.store == "native"
    assert mixed.keys.unpack().dtype == torch.bfloat16
    with pytest.raises(ValueError, match="as many heads"):
        appended([a, heads(1, 1, beta=False)], torch.float32)


def turned_by(**rope: Any) -> LoadedModel:
    """A Llama with a RoPE of that kind, stretched beyond 64 positions."""
    parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, **rope}
    options = {"vocab_size": families.VOCAB, "max_position_embeddings": 1024}
    config = tiny.config("llama", rope_parameters=parameters, **options)
    return load(str(families.saved(config)), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 16.0},
        {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_every_rope_of_fixed_frequencies(rope: dict[str, Any]) -> None:
    parts = contexts(turned_by(**rope), 30, 40)
    joined = join(parts)
    question = torch.tensor([joined.loaded.chat.first_turn("Who?")[:QUESTION]])
    want = logits(joined, read_in_place(parts), question)
    torch.testing.assert_close(logits(joined, joined.cache, question), want, atol=2e-4, rtol=0)


def test_a_rope_whose_frequencies_change_is_refused() -> None:
    parts = contexts(turned_by(rope_type="dynamic", factor=16.0), 30, 40)
    with pytest.raises(UsageError, match="dynamic RoPE") as error:
        join(parts)
    assert "one context at a time" in str(error.value.hint)


@pytest.mark.parametrize(("name", "said"), [("qwen3_next", "keep a state"), ("gpt2", "rotary")])
def test_what_cannot_be_moved_is_refused_by_name(name: str, said: str) -> None:
    loaded = families.loaded(name)
    parts = contexts(loaded, 8, 9)
    with pytest.raises(UsageError, match=said) as error:
        join(parts)
    assert "one context at a time" in str(error.value.hint)


def test_too_many_tokens_together_are_refused() -> None:
    loaded = model("llama")
    geometry = replace(loaded.geometry, rope={}, max_positions=220)
    parts = contexts(replace(loaded, geometry=geometry), 20, 20)
    assert sum(part.T for part in parts) + 64 > 220
    with pytest.raises(UsageError, match="has 220 positions"):
        join(parts)


def test_answers_about_both_documents() -> None:
    loaded = model("pocket")
    documents = [generate(seed, 900) for seed in (3, 4)]
    parts = [
        prefill(loaded, Source(f"{n}.txt", document.text)) for n, document in enumerate(documents)
    ]
    joined = join(parts)
    assert joined.source["name"] == "0.txt, 1.txt"
    asked = [
        (fact.question, fact.answer)
        for document in documents
        for fact in Questioner(document).distinct(Random(1), "direct", 6)
    ]
    replies = answers(
        loaded, joined.cache, [loaded.chat.first_turn(q) for q, _ in asked], [16] * len(asked)
    )
    right = [said == answer for said, (_, answer) in zip(replies, asked, strict=True)]
    assert sum(right[:6]) >= 5
    assert sum(right[6:]) >= 5
