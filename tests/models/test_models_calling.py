"""The cache reaches a model by the name that its code gives it, whatever transformers calls it."""

from __future__ import annotations

from typing import Any

import boxes
import pytest
import tinymodels as tiny
import torch
from transformers import LlamaForCausalLM

from amcli.models import adopted, calling
from amcli.models.calling import GENERATE, cache_in, run
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.reading import prefill

T = 21


class Older(LlamaForCausalLM):
    """As the code of a model on the hub may be: written before the argument was renamed."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        kwargs.pop("cache", None)  # as any that it does not know
        given = {} if past_key_values is None else {GENERATE: past_key_values}
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **given,
            **kwargs,
        )


class Oldest(Older):
    """The same, with inputs for `generate` prepared by its own code, too."""

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, past:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": True,
        }


def older(kind: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    """A tiny model with the weights of another."""
    like = tiny.build("llama")
    model = kind(like.config)
    model.load_state_dict(like.state_dict())
    return model.eval().requires_grad_(False)


def test_a_forward_is_called_by_the_name_it_knows() -> None:
    tokens = tiny.ids(T)
    want = tiny.logits(tiny.build("llama"), tokens, tiny.empty("llama"))
    for model in (tiny.build("llama"), older(Older)):
        cache = tiny.empty("llama")
        parts = [run(model, cache, part).logits for part in tokens.split(8, dim=1)]
        assert cache.get_seq_length() == T
        torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-5, rtol=0)


def test_a_decoder_is_called_by_its_own_name() -> None:
    cache = tiny.empty("llama")
    run(older(Older).model, cache, tiny.ids(T))
    assert cache.get_seq_length() == T


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Older, Oldest])
def test_generate_reaches_the_cache_of_any_model(kind: type[LlamaForCausalLM]) -> None:
    """Once adopted; the call by its other name would be ignored without a word."""
    loaded = boxes.model("llama")
    context = prefill(loaded, boxes.source())
    compact(context, Request(method="keep"), errors=False).apply()
    tokens = torch.tensor([[*context.ids, *loaded.chat.first_turn("Who is it?")]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = loaded.model.generate(tokens, **options)

    model = kind.from_pretrained(loaded.id, dtype=torch.float32)
    adopted.adopt(model, loaded.tokenizer)
    cache = context.cache.fork()
    got = model.generate(tokens, **{GENERATE: cache}, **options)
    assert cache.get_seq_length() == got.shape[1] - 1
    assert got.tolist() == want.tolist()
    adopted.release(model)


def test_the_cache_is_found_by_either_name() -> None:
    cache = tiny.empty("llama")
    assert cache_in({"cache": None, "past_key_values": cache}) is cache
    assert cache_in({"cache": cache, "use_cache": True}) is cache
    assert cache_in({"use_cache": True}) is None


def test_nothing_is_translated_where_both_say_the_same() -> None:
    model = older(LlamaForCausalLM)
    before = dict(vars(model))
    calling.translate(model)
    assert vars(model) == before
    assert not model._forward_pre_hooks
