"""The packaged model's files, loaded once for all tests of pocket."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from amcli.generator.tokens import Sampler
from amcli.pocket import folder


@cache
def sampler() -> Sampler:
    return Sampler(Tokenizer.from_file(str(folder() / "tokenizer.json")))


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder())
