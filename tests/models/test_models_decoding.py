"""Captured steps against steps from Python: the same tokens, and the same cache after them.

On a CPU, recorded operations stand in for CUDA graphs; they are as blind to Python.
"""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Any

import families
import pytest
import torch
from recorded import Recorded

from amcli.errors import AmkvWarning, UsageError
from amcli.models import decoding
from amcli.models.cache import CompactCache
from amcli.models.decoding import Decoder, Step
from amcli.models.generate import _choose, feed, stream
from amcli.models.layer import CompactLayer
from amcli.models.loading import LoadedModel, load
from amcli.models.replies import replies
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context, full_layers
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.talk.session import Session

WAITS = {"gpt2", "aria_text"}
"""Families that wait for the device in each step: with a padding token, GPT-2 looks for padding;
Aria's experts, before transformers 5.24, take one after the other."""

SOME = ["qwen3", "gemma2", "gemma3_text", "mistral", "gpt_oss", "qwen3_next", "nemotron_h", "lfm2"]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured on the CPU too, over buffers that soon have to grow."""
    monkeypatch.setitem(decoding.GRAPHS, "cpu", Recorded)
    monkeypatch.setattr(decoding, "ROOM", 16)
    decoding._can.clear()
    decoding._said.clear()
    monkeypatch.setattr(Recorded, "made", 0)


MIXED = "k4v4 and k8v8"
"""As contexts are stored by default: some layers in 4 bits, others in 8."""


def compacted(loaded: LoadedModel, ratio: float | None, store: str) -> Context:
    """A context of the document in a store; no ratio: as it is."""
    found = prefill(loaded, families.DOCUMENT)
    if ratio is not None:
        layers = enumerate(full_layers(found))
        stores = {i: ("k4v4", "k8v8")[n % 2] for n, i in layers} if store == MIXED else store
        method = Request(ratio=ratio, method="highest-attention", queries="repeat", store=stores)
        compact(found, method, errors=False).apply()
    return found


@cache
def context(name: str, ratio: float | None = 3, store: str = "native") -> Context:
    """A compact context of a family's tiny model; None: the document as it is."""
    return compacted(families.loaded(name), ratio, store)


def said(
    name: str,
    tokens: int,
    temperature: float = 1.0,
    ratio: float | None = 3,
    store: str = "native",
    **options: Any,
) -> tuple[list[int], CompactCache]:
    loaded = families.loaded(name)
    fork = context(name, ratio, store).cache.fork()
    prompt = loaded.chat.first_turn(families.QUESTION)
    options = {"stop_ids": frozenset(), **options}
    ids = stream(loaded, fork, prompt, max_tokens=tokens, temperature=temperature, **options)
    return list(ids), fork


def same(one: CompactCache, other: CompactCache) -> None:
    """Both hold the same."""
    assert one.get_seq_length() == other.get_seq_length()
    for a, b in zip(one.attention, other.attention, strict=True):
        n = min(a.live()[0].shape[2], b.live()[0].shape[2])
        for x, y in zip(a.live(), b.live(), strict=True):
            torch.testing.assert_close(x[:, :, -n:], y[:, :, -n:], atol=1e-4, rtol=1e-4)
    mine, others = one.get_states(), other.get_states()
    assert mine.keys() == others.keys()
    for place, state in mine.items():
        torch.testing.assert_close(state, others[place], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in families.known() if name not in WAITS])
def test_a_family(name: str, request: pytest.FixtureRequest) -> None:
    wanted, before = said(name, 100)
    request.getfixturevalue("captures")
    found, after = said(name, 100)
    assert found == wanted
    same(after, before)
    assert after.step.graph is not None
    assert Recorded.made > 1, "the buffers never grew"


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("ratio", [3, None])
def test_greedy_answers_with_and_without_a_prefix(
    name: str, ratio: float | None, request: pytest.FixtureRequest
) -> None:
    wanted, before = said(name, 30, 0.0, ratio)
    request.getfixturevalue("captures")
    found, after = said(name, 30, 0.0, ratio)
    assert found == wanted
    same(after, before)
    assert Recorded.made


@pytest.mark.parametrize("name", SOME)
def test_default_stores(name: str, request: pytest.FixtureRequest) -> None:
    """Where kernels are missing: codes become numbers without a copy from the host."""
    wanted, before = said(name, 30, store=MIXED)
    request.getfixturevalue("captures")
    found, after = said(name, 30, store=MIXED)
    assert found == wanted
    same(after, before)
    assert after.step.graph is not None
    assert decoding._stores(after) <= {"k4v4", "k8v8"}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_to_several_prompts(
    name: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    loaded = families.loaded(name)
    questions = ["Who?", families.QUESTION, "Where does the otter live, and who is its owner?"]
    prompts = [loaded.chat.first_turn(question) for question in [*questions, *questions[:2]]]

    def replied() -> list[list[int]]:
        options: dict[str, Any] = {"temperature": temperature, "seed": 3}
        limits = [60, 1, 33, 60, 47]
        return [x.ids for x in replies(loaded, context(name).cache, prompts, limits, **options)]

    wanted = replied()
    request.getfixturevalue("captures")
    assert replied() == wanted
    assert Recorded.made > 1


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("ratio", [3, None])
def test_a_graph_serves_the_next_batch(
    name: str, ratio: float | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows that are full or not, and as long as there is room and the rows are as many."""
    loaded = families.loaded(name)
    questions = ["Who?", "Who is it?", "Where is the otter?", "Where does Omar live?", "Why?"]
    prompts = [loaded.chat.first_turn(question) for question in questions]

    def replied(limit: int) -> list[list[int]]:
        options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "rows": 2}
        cache = context(name, ratio).cache
        return [x.ids for x in replies(loaded, cache, prompts, [limit] * 5, **options)]

    wanted = {limit: replied(limit) for limit in (30, 80)}
    request.getfixturevalue("captures")
    monkeypatch.setattr(decoding, "ROOM", 256)
    assert replied(30) == wanted[30]
    assert Recorded.made == 2, "one for two rows, one for the last"
    monkeypatch.setattr(decoding, "ROOM", 16)
    assert replied(80) == wanted[80]
    assert Recorded.made > (2 if ratio is None else 4), "the buffers never were too small"


def test_buffers_that_someone_shares_are_not_let_go(captures: None) -> None:
    loaded, fork = families.loaded("qwen3"), context("qwen3").cache.fork()
    decoder = Decoder(loaded.model, fork, 20)
    for _ in range(3):
        decoder.feed(torch.tensor([[7]]))
    other = fork.fork()
    assert decoder.let_go() == []
    decoder = Decoder(loaded.model, other, 20)
    for _ in range(3):
        decoder.feed(torch.tensor([[7]]))
    (step,) = decoder.let_go()
    assert step.free
    assert not step.take(context("qwen3").cache.fork(2), 2, 20), "other rows"
    assert not step.take(context("qwen3", 2).cache.fork(), 1, 20), "another prefix"


def test_a_stop_token_ends_an_answer_and_is_not_in_the_cache(captures: None) -> None:
    ids, _ = said("qwen3", 30)
    stop = ids[20]
    found, cache = said("qwen3", 30, stop_ids=frozenset({stop}))
    assert found == ids[: ids.index(stop)]
    prompt = families.loaded("qwen3").chat.first_turn(families.QUESTION)
    assert cache.get_seq_length() == context("qwen3").T + len(prompt) + len(found)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "qwen3_next"])
def test_a_conversation_goes_on_from_what_was_said(
    name: str, request: pytest.FixtureRequest
) -> None:
    def talk() -> tuple[list[str], CompactCache, list[int]]:
        session = Session(context(name), max_tokens=50, temperature=1.0)
        said = ["".join(session.ask(families.QUESTION)), "".join(session.ask("And who?"))]
        answer = session.ask("Tell me all.")
        said += islice(answer, 3)
        answer.close()  # in the middle of an answer
        said += ["".join(session.ask("Go on."))]
        session.undo()
        said += ["".join(session.ask("Once again."))]
        return said, session.cache, session.ids

    wanted, before, ids = talk()
    request.getfixturevalue("captures")
    found, after, found_ids = talk()
    assert (found, found_ids) == (wanted, ids)
    same(after, before)
    assert Recorded.made > 1


def test_a_graph_serves_as_long_as_its_buffers(
    captures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "ROOM", 512)
    loaded, fork = families.loaded("qwen3"), context("qwen3").cache.fork()
    for question in ("Who?", "Where?", "Why?"):
        prompt = loaded.chat.first_turn(question)
        list(stream(loaded, fork, prompt, max_tokens=12, stop_ids=frozenset()))
    assert Recorded.made == 1
    fork.fork()  # shares the buffers, which are not written to any more
    list(stream(loaded, fork, [5, 6], max_tokens=12, stop_ids=frozenset()))
    assert Recorded.made == 2


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("step", range(2, 7))
@pytest.mark.parametrize("where", ["launch", "keep", "advance"])
def test_an_interrupt_leaves_out_the_last_token(
    name: str, step: int, where: str, captures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = said(name, 20)
    fork, calls = context(name).cache.fork(), 0
    owner, method = (CompactLayer, "advance") if where == "advance" else (Step, where)
    real = getattr(owner, method)

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        found = real(*arguments)
        if calls == (3 * step - 1 if where == "advance" else step):
            raise KeyboardInterrupt
        return found

    loaded = families.loaded(name)
    prompt = loaded.chat.first_turn(families.QUESTION)
    options: dict[str, Any] = {"temperature": 1.0, "stop_ids": frozenset()}
    found: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            found.extend(stream(loaded, fork, prompt, max_tokens=20, **options))
    assert found == wanted[: len(found)]
    fed = fork.get_seq_length() - context(name).T - len(prompt)
    assert len(found) - 1 <= fed <= len(found)
    assert all(layer.length == fork.get_seq_length() for layer in fork.attention)
    again = context(name).cache.fork()
    want = feed(loaded.model, again, [*prompt, *found[:fed], 7])
    decoder = Decoder(loaded.model, fork, 20)
    torch.testing.assert_close(decoder.feed(torch.tensor([[7]]))[0], want, atol=1e-4, rtol=1e-4)
    same(fork, again)


def test_what_cannot_be_captured_is_said_once(captures: None) -> None:
    name = "gpt2"
    with pytest.warns(AmkvWarning, match="cannot be captured as a graph"):
        first, _ = said(name, 12)
    assert said(name, 12)[0] == first  # another warning would be an error


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("full"), RuntimeError("not allowed while capturing")]
)
def test_a_failed_capture_leaves_it_to_python(
    failure: Exception, captures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, before = said("gemma3_text", 30)

    def fail(*arguments: Any) -> None:
        raise failure

    monkeypatch.setattr(Recorded, "__init__", fail)
    with pytest.warns(AmkvWarning, match=f"takes longer: {failure}"):
        found, after = said("gemma3_text", 30)
    assert found == wanted
    same(after, before)
    assert said("gemma3_text", 30)[0] == wanted  # another warning would be an error


def test_queries_that_are_observed_are_not_captured(captures: None) -> None:
    seen: list[int] = []
    loaded, fork = families.loaded("qwen3"), context("qwen3").cache.fork()
    with fork.observe(lambda index, *_: seen.append(index)):
        list(stream(loaded, fork, [5, 6], max_tokens=12, stop_ids=frozenset()))
    assert len(seen) == 3 * 13
    assert Recorded.made == 0


def test_a_store_that_cannot_be_captured_says_nothing_of_others(captures: None) -> None:
    loaded = families.loaded("qwen3")
    decoding._can[loaded.model] = {frozenset({"native"}): False}
    assert said("qwen3", 20)[1].step is None
    assert said("qwen3", 20, ratio=None)[1].step.graph is not None


def test_few_tokens_are_not_worth_a_capture(captures: None) -> None:
    assert said("qwen3", decoding.WORTH - 1)[1].step is None


def test_a_text_that_outgrows_an_ignored_window_is_refused(captures: None) -> None:
    loaded = load(str(families.saved(families.tiny.config(
        "mistral", vocab_size=families.VOCAB, max_position_embeddings=60, sliding_window=64
    ))), device="cpu", dtype="float32")  # fmt: skip
    assert loaded.geometry.layers[0].window is None
    cache = CompactCache.empty(loaded.geometry)
    found: list[int] = []
    with pytest.raises(UsageError, match="sees no more than 64 tokens"):
        found.extend(stream(loaded, cache, [5] * 20, max_tokens=80, stop_ids=frozenset()))
    assert len(found) == 45
    assert Recorded.made


def test_the_capacity_grows_by_halves_and_less() -> None:
    sizes = [decoding.capacity(n) for n in (1, 256, 257, 600, 1025, 3000, 60_000)]
    assert sizes == [256, 256, 512, 768, 1536, 3072, 65_536]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_seeds_mean_what_they_mean_to_pytorch_on_a_cpu(temperature: float) -> None:
    logits = 3 * torch.randn(300, generator=torch.Generator().manual_seed(0))
    mine, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    for _ in range(200):
        weights = (logits.double() / temperature).softmax(-1)
        wanted = torch.multinomial(weights, 1, generator=theirs)
        assert torch.equal(_choose(logits, temperature, mine), wanted)


@pytest.mark.usefixtures("captures")
@pytest.mark.parametrize("change", ["a hook", "other weights"])
def test_a_model_that_changes_between_turns_is_captured_again(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As adapters change one: a graph of the model as it was would go on as before."""
    monkeypatch.setattr(decoding, "ROOM", 256)  # for both turns

    def turns(captured: bool) -> tuple[list[int], int]:
        loaded = load("pocket", device="cpu", dtype="float32")
        fork = prefill(loaded, families.DOCUMENT).cache.fork()
        prompt = loaded.chat.first_turn(families.QUESTION)
        found: list[int] = []
        if not captured:
            decoding._can[loaded.model] = {frozenset(): False}
        for turn in range(2):
            if turn:
                head = loaded.model.lm_head
                if change == "a hook":
                    head.register_forward_hook(lambda module, args, out: -out)
                else:
                    head.weight = torch.nn.Parameter(-head.weight.detach())
            tokens = stream(loaded, fork, prompt, stop_ids=frozenset(), max_tokens=20)
            found += islice(tokens, 20)
        return found, Recorded.made

    plain, none = turns(False)
    mine, made = turns(True)
    assert mine == plain
    assert (none, made) == (0, 2)


def test_a_switch_of_a_module_is_noticed() -> None:
    model = families.loaded("qwen3").model
    before = decoding._parts(model)
    assert decoding._parts(model) == before
    model.lm_head.merged = False
    try:
        assert decoding._parts(model) != before
    finally:
        del model.lm_head.merged
    assert decoding._parts(model) == before
