"""Writes `models.md`: which model families work, measured, and which are refused, and why.

    python docs/models.py

The rows are those of `families.py` and `refusals.py` in `tests/models`, which the tests run too.
The one thing that is measured here is how far a context that keeps everything is from the model's
own attention.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "models"))

import families  # noqa: E402
from families import DOCUMENT, FAMILIES, QUESTION  # noqa: E402
from refusals import REFUSED  # noqa: E402

from amcli.pipeline.compaction.compacting import compact  # noqa: E402
from amcli.pipeline.compaction.request import Request  # noqa: E402
from amcli.pipeline.contexts.opening import restore  # noqa: E402
from amcli.pipeline.contexts.reading import prefill  # noqa: E402
from amcli.storage.artifacts import Artifact  # noqa: E402

PAGE = HERE / "models.md"

HEAD = """\
# Models

<!-- Written by `python docs/models.py`; do not edit. -->

`amkv` runs the unmodified modelling code of transformers, 5.17 to the newest, with an attention
function and a cache of its own. What decides is the mechanism, not the name: a family that is in
neither table works if its layers attend through transformers' `AttentionInterface` and cache keys
and values. When a model is loaded, a few tokens are fed to it to find out, and one that cannot work
is refused in one line that names its type and the reason.

## Families that work

Each row is a tiny random model of the family that is run by the tests: a document is prefilled,
kept whole (`--method keep`), written, loaded, and asked. The last column is the largest difference
of any logit, in float32, from the model's own eager attention over its own full cache. Then the
document is compacted 4 times with `omp`, written and loaded, and the model answers from that.

| family | for example | compacted | kept as they are | special | largest difference |
| --- | --- | --- | --- | --- | --- |
"""

MIDDLE = """
Sliding-window layers are not compacted: they store the last tokens that their window reaches, in 8
bits unless a store is named, and `inspect` shows them as what they are. A window as long as all
positions of the model is none: such layers are compacted like any other.

Layers with a state (linear attention, SSMs, short convolutions) have nothing to compact: what they
keep has one size, whatever the length of the text. It is stored as it is, restored, and copied for
every conversation; it stands for the whole document, so that a conversation cannot be taken back to
an earlier point, only begun again. Layers are counted without them wherever `amkv` shows a number.

## Families that are refused

| reason | families |
| --- | --- |
"""

TAIL = """
## GGUF files

`--model path/to/model-Q4_K_M.gguf` reads a GGUF file of llama.cpp, with
`pip install 'amkv[gguf]'`. Configuration, tokenizer and chat template are the file's; what lies
beside it has no say. transformers reads it, so the architecture has to be one that its GGUF reader
knows; for any other, name the folder or hub id that the file was made from.

- Weights are unpacked to `--dtype`, and take the memory of that type: the line before loading
  counts in it, not in bytes of the file. A file of 0.1 GB with 135 million numbers takes 0.54 GB in
  float32.
- Of a model in parts, `name-00001-of-00003.gguf`, any part may be named; all have to be in one
  folder. transformers does not read parts: they are copied to one temporary file, which takes
  their size in `TMPDIR` while the model is being loaded. Where that folder is kept in memory, name
  another.
- Loading takes longer than from a folder: transformers goes through the file and its vocabulary
  more than once.
- A file without a chat template works as base models do, and a line says so: document and questions
  are plain text, and the model cannot be told to ask itself questions.
- RoPE that is scaled for long texts, as in Llama 3.1, is not read from most GGUF files by
  transformers: the model works, a line says that it lost this, and the folder is the better choice.
- A file is the same model in any place and under any name. Another packing of it is another model:
  its weights are other numbers, further from these than a fine-tune's often are. A folder is the
  same where its configuration and tokenizer are those of the file: one that was saved from it often
  is, but Qwen's tokenizer gains a Unicode normalisation when transformers reads it from a folder.
  The repository the file was made from mostly says more than the file.
- Old versions of transformers, such as 5.17, make another tokenizer of a file than new ones, and
  artifacts are refused across that line.

## Documents and questions are text

What looks like a control token in a document, a question or an instruction is only text, so that a
document cannot close its turn, call a tool or think for the model. `<|im_end|>` and `<tool_call>`
are read as their characters, though the tokenizer has them as one token each.

- Control words are all added tokens that are flagged special; those that the chat template
  mentions; and those that mix letters with signs, such as `<think>`, `[/INST]` or Gemma's `<h1>`.
- Runs of white space (GPT-NeoX, Phi, Gemma), whole words and single signs that were added to a
  tokenizer are text that happens to be one token. They stay one, as the model was trained to read
  them. So does the token for unknown characters, but nobody gets it by writing its name.
- A text without control words has the same tokens as ever.

## Models without a chat template

A base model reads the document, an empty line, `Question: …` and `Answer:`. It has no token that
ends a turn, and would go on with questions of its own. So an answer ends where `Question:` begins
another line; what the model wrote from there on is neither shown nor remembered. Such a model
cannot be told to ask itself questions.

## Which model an artifact fits

An artifact is refused (exit code 4) by any model but the one it was made with. `amkv verify
--model` says beforehand whether it fits. What has to be the same:

- **Weights**: a thousand numbers or so, sampled from every tensor in milliseconds. No difference
  makes the dtype, stored or loaded, and how the weights are spread over files, devices, processes
  of tensor parallelism, or in a GGUF file.
- **Configuration**: the keys that the model's code reads; an error names the key and both values.
  No difference make other keys, such as `transformers.js_config`, those for training and
  generation, and defaults spelled out; with plain RoPE, neither does `max_position_embeddings`.
- **Tokenizer**: vocabulary, merges, normalisation, special tokens; not padding and truncation.
- **Chat template**: what it puts around a document, questions and answers; not comments, branches
  for tools, and how it is written.

More about weights, and what cannot be told:

- Weights may be rounded once: float32, bfloat16 and float16 of the same numbers are one model. A
  fine-tune is another one, also an adapter merged into it, and so is anything quantised, as against
  what it was made from. What is quantised is compared by its own numbers if it is unpacked when it
  is loaded (GGUF); weights that stay packed are left out, and the rest is compared.
- Sampled numbers cannot show everything: a change of less than rounding, or of one number in
  thousands, may go unnoticed.
- Files from before format 1.4 hold neither weights nor keys. They are still accepted; `amkv verify
  --model` then says that it cannot tell which weights they were made with, and an error about their
  configuration can only give its hash.
- A hub model is remembered with its commit, and loaded again at that commit, whatever its branch or
  tag has become. A model that your own script has loaded has one only if transformers says so,
  which it has not done since 5.22.

## Several GPUs

`--device-map auto` spreads a model's layers over all GPUs, and each layer's entries lie with it
(`pip install 'amkv[multi-gpu]'`). Tensor parallelism is transformers' own: `torchrun` starts a
process for each GPU, each has its share of every layer's heads, and of their entries. `prefill`,
`compact` and `chat -p` run so, and read and write the same files as one process does:

    torchrun --nproc-per-node 2 --no-python amkv chat --context doc.amkv -p "Who wrote this?"

The KV heads have to divide evenly among the processes; layers that keep a state are not divided.

## Positions

- Keys are stored as the model turned them, whatever its RoPE: `default`, `linear`, `yarn`,
  `llama3`, partial, or none in some layers. The methods that turn keys themselves
  (`expected-attention`, `streaming`) take the rotation from the model.
- `dynamic` and `longrope` choose their frequencies by the length of the text. A document is read in
  chunks, and each is turned as a part of the whole. Answers go on as in transformers. With
  `longrope`, a context that ends before the original length has no positions past it, because the
  model would turn by other frequencies there. Methods that turn keys are refused for both.
- A document longer than the model was made for, RoPE scaling included, is read with a warning; by a
  model with a table of positions, which ends, it is refused.
"""


def kept_error(name: str) -> float:
    """The largest difference of a logit between a kept context and the model's own cache."""
    loaded = families.loaded(name)
    context = prefill(loaded, DOCUMENT, chunk=50)
    ids = loaded.chat.first_turn(QUESTION)
    wanted = families.full_logits(families.eager(families.folder(name)), context.ids, ids)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "keep.amkv"
        compact(context, Request(method="keep"), errors=False).save(path, overwrite=False)
        with Artifact.open(path) as artifact:
            again = restore(artifact, loaded)
    return float((families.cached_logits(again, ids) - wanted).abs().max())


def page(errors: Mapping[str, str]) -> str:
    """The whole page; `errors` are those of `kept_error`, as they are printed."""
    rows = []
    for name, family in FAMILIES.items():
        hub = f"`{family.hub}`" if family.hub else ""
        compacted = "full layers" if family.kept else "all layers"
        cells = (f"`{name}`", hub, compacted, family.kept, family.note, errors[name])
        rows.append("| " + " | ".join(cells) + " |")
    reasons: dict[str, list[str]] = {}
    for name, refusal in REFUSED.items():
        reasons.setdefault(refusal.why, []).append(f"`{name}`")
    refused = [f"| {why} | {', '.join(names)} |" for why, names in reasons.items()]
    return HEAD + "\n".join(rows) + "\n" + MIDDLE + "\n".join(refused) + "\n" + TAIL


def main() -> None:
    """Measures every family and writes the page."""
    missing = sorted(set(FAMILIES) - set(families.known()))
    if missing:
        raise SystemExit(f"this transformers does not have {', '.join(missing)}: use a newer one")
    PAGE.write_text(page({name: f"{kept_error(name):.0e}" for name in FAMILIES}), encoding="utf-8")


if __name__ == "__main__":
    main()
