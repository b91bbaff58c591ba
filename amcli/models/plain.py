"""Outside text as token ids in which nothing is a control token.

Tokenizers cut added tokens out of a text before anything else. Some of them are control words:
those flagged special, and others that templates and models use in the same way, such as
`<tool_call>` or, in Qwen3, `<think>`. A document that has these characters in it gets the ids of
the characters. Other added tokens are just text (runs of spaces in GPT-NeoX and Phi, whole words)
and stay: they can say nothing that could not be said without them, and models were trained to read
them as one token.

A text that gives no control token is left exactly as the tokenizer has it. Any other is read again
by a copy of the tokenizer in which control words have names that no text has.
"""

from __future__ import annotations

import json
import re
import secrets
import unicodedata
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from amcli.errors import UsageError

_METASPACE = "▁"
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class PlainText:
    """Tokenises text from outside.

    words  the control words by their ids, none of which comes of any text. Only the token for
           unknown characters does, where there are some.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        template = str(getattr(tokenizer, "chat_template", None) or "")
        self.words = {
            i: token.content
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special or not _is_text(token.content, template)
        }
        for i in tokenizer.all_special_ids:
            self.words.setdefault(i, str(tokenizer.convert_ids_to_tokens(i)))
        # Tokenizers write characters that they do not know in bytes.
        self.words = {i: word for i, word in self.words.items() if not _BYTE.fullmatch(word)}
        self._unknown: int | None = tokenizer.unk_token_id
        unknown = None if self._unknown is None else self.words.get(self._unknown)
        self._unknown_word: str | None = unknown

    def ids(self, text: str) -> list[int]:
        """The ids of a text. Raises UsageError where a word can only be read as a control token."""
        if not text:
            return []
        found = self._encode(text)
        said = self._unknown_word is not None and self._unknown_word in text
        if self._control_in(found) is None and not said:
            return found
        if self._tokenizer.is_fast:
            found = list(self._renamed.encode(text, add_special_tokens=False).ids)
        else:
            found = [i for piece in self._pieces(text) for i in self._encode(piece)]
        worst = self._control_in(found)
        if worst is None:
            return found
        word = self.words[worst]
        raise UsageError(
            f"the tokenizer cannot read {word!r} as text, only as a control token",
            f"take {word!r} out of the text, or choose another model",
            code="control-token-in-text",
            field="source",
            token=word,
        )

    def _encode(self, text: str) -> list[int]:
        """The ids as the tokenizer has them, with special tokens, but not all others, as text."""
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])

    def _control_in(self, ids: list[int]) -> int | None:
        if self.words.keys().isdisjoint(ids):
            return None
        return next((i for i in ids if i in self.words and i != self._unknown), None)

    def _pieces(self, text: str) -> list[str]:
        """The text, cut in the middle of every control word."""
        words = sorted((w for w in self.words.values() if len(w) > 1), key=len, reverse=True)
        cuts = [0]
        for found in re.finditer("|".join(map(re.escape, words)) or r"(?!)", text):
            cuts.append((found.start() + found.end()) // 2)
        return [text[i:j] for i, j in zip(cuts, [*cuts[1:], len(text)], strict=True)]

    @cached_property
    def _renamed(self) -> Tokenizer:
        """A copy of the tokenizer that does not know the control words; ids stay what they are."""
        backend: Any = self._tokenizer
        record = json.loads(backend.backend_tokenizer.to_str())
        secret = secrets.token_hex(16)
        names = {i: f"\ue000{secret}:{i}\ue000" for i in self.words}
        for token in record["added_tokens"]:
            if token["id"] in names:
                token.update(content=names[token["id"]], normalized=False, special=True)
                token.update(lstrip=False, rstrip=False, single_word=False)
        _rename(record["model"], names)
        record.update(post_processor=None, truncation=None, padding=None)
        made = Tokenizer.from_str(json.dumps(record))
        made.encode_special_tokens = True
        return made


def _rename(model: dict[str, Any], names: dict[int, str]) -> None:
    """Renames entries of a tokenizer's vocabulary, and takes out the merges that give them."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: pieces with their scores
        for i, name in names.items():
            if i < len(vocab):
                vocab[i][0] = name
        return
    gone = {word: names[i] for word, i in vocab.items() if i in names}
    model["vocab"] = {gone.get(word, word): i for word, i in vocab.items()}
    if model.get("unk_token") in gone:
        model["unk_token"] = gone[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [
            [a, b] for a, b in pairs if gone.keys().isdisjoint((a, b, a + b.removeprefix(prefix)))
        ]


def _is_text(word: str, template: str) -> bool:
    """Whether an added token that is not flagged special is just text.

    White space is, and so are words and signs that the template does not mention. Letters between
    signs, as in `<tool_call>` or `[/INST]`, are how control words look.
    """
    bare = word.replace(_METASPACE, " ").strip()
    if not bare:
        return True
    kinds = {unicodedata.category(c)[0] for c in bare if not c.isspace()}
    return bare not in template and (kinds <= {"L", "M", "N"} or kinds.isdisjoint({"L", "N"}))
