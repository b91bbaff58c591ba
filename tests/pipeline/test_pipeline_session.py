"""Conversations: taking turns back, instructions, the end of positions, and growing contexts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from boxes import model, source

from amcli.errors import UsageError
from amcli.generator.dialogues import Question, Questioner
from amcli.generator.documents import generate
from amcli.models.calling import run
from amcli.models.thinking import MARKS
from amcli.pipeline.compaction.compacting import compact
from amcli.pipeline.compaction.request import Request
from amcli.pipeline.contexts.context import Context
from amcli.pipeline.contexts.opening import restore
from amcli.pipeline.contexts.reading import prefill
from amcli.pipeline.contexts.source import Source
from amcli.pipeline.talk import growing
from amcli.pipeline.talk.growing import grow
from amcli.pipeline.talk.session import Session
from amcli.storage.artifacts import Artifact
from amcli.system.progress import Silent
from amkv_format import AmkvFile

NAMES = ["llama", "mistral", "gemma3_text"]  # full, all sliding, and both


def said(session: Session, question: str) -> str:
    return "".join(session.ask(question))


@pytest.fixture(params=NAMES)
def session(request: pytest.FixtureRequest) -> Session:
    return Session(prefill(model(request.param), source(60)), max_tokens=9)


def test_a_turn_that_is_taken_back_leaves_no_trace(session: Session) -> None:
    first = said(session, "Who lives here?")
    ids, length = list(session.ids), session.length
    second = said(session, "And what else is there to know?")
    assert session.length > length
    assert session.undo().question == "And what else is there to know?"
    assert (session.ids, session.length, session.turns) == (ids, length, 1)
    assert session.cache.get_seq_length() == length
    assert said(session, "And what else is there to know?") == second
    session.undo(), session.undo()
    assert session.cache.get_seq_length() == session.context.T
    assert said(session, "Who lives here?") == first


def test_there_has_to_be_a_turn_to_take_back(session: Session) -> None:
    with pytest.raises(UsageError, match="nothing was asked yet"):
        session.undo()


def test_the_ids_are_those_in_the_cache_also_after_an_interrupt() -> None:
    session = Session(prefill(model("llama"), source(60)), max_tokens=9)
    answer = session.ask("Who lives here?")
    next(answer)
    answer.close()  # what Ctrl-C does between two pieces
    assert session.history[0].ended == "broken-off"
    assert session.cache.get_seq_length() == session.length
    again = Session(session.context, max_tokens=9)
    again.adopt(session.context, list(session.ids))
    again.history = list(session.history)
    assert said(again, "And then?") == said(session, "And then?")


def test_instructions_are_told_once_and_again_after_a_reset() -> None:
    loaded = model("llama")
    session = Session(prefill(loaded, source(60)), max_tokens=2, system="Be brief.")
    decode = loaded.tokenizer.decode

    def told(question: str) -> bool:
        return "Be brief." in str(decode(session.prompt_ids(question)))

    assert told("Who?")
    said(session, "Who?")
    assert not told("Who?")
    session.undo()
    assert told("Who?")
    said(session, "Who?")
    session.system = None
    assert not told("Who?")
    session.system = "Be brief."
    session.reset()
    assert told("Who?")


def test_answers_end_where_positions_do_and_say_so() -> None:
    context = prefill(model("llama"), source(60))
    probe = len(Session(context).prompt_ids("Who?"))
    limit = context.T + probe + 5
    geometry = replace(context.loaded.geometry, max_positions=limit)
    session = Session(replace(context, loaded=replace(context.loaded, geometry=geometry)))
    said(session, "Who?")
    turn = session.history[0]
    assert (turn.tokens, turn.ended, session.length) == (5, "positions", limit)
    with pytest.raises(UsageError, match=f"{limit:,} positions: {limit:,} are taken"):
        said(session, "Who?")
    assert session.turns == 1


# ---- where answers end ------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, session: Session, text: str) -> None:
    """Makes the model say something, token by token, and then anything."""
    tokenizer = session.context.loaded.tokenizer
    ids = iter(tokenizer(text, add_special_tokens=False)["input_ids"])
    rest = tokenizer("b", add_special_tokens=False)["input_ids"][0]
    monkeypatch.setattr("amcli.models.generate._choose", lambda *_: torch.tensor([next(ids, rest)]))


@pytest.mark.parametrize("name", ["raw", "mistral", "gemma3_text"])
def test_without_a_template_an_answer_ends_where_the_next_question_begins(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = model(name)
    if name != "raw":  # windows that have forgotten what came before
        monkeypatch.setattr(type(loaded.chat), "stop_text", "\nQuestion:")
    session = Session(prefill(loaded, source(60)), max_tokens=60)
    before = session.prompt_ids("Who?")
    with monkeypatch.context() as patch:
        scripted(patch, session, " Anna.\n\nQuestion: And who else?\nAnswer: Nobody.")
        pieces = list(session.ask("Who?"))
    [turn] = session.history
    assert ("".join(pieces).strip(), turn.answer, turn.ended) == ("Anna.", "Anna.", "stop")
    answer = loaded.tokenizer(" Anna.", add_special_tokens=False)["input_ids"]
    assert session.ids == before + answer
    assert turn.tokens == len(answer)
    assert session.cache.get_seq_length() == session.length
    again = Session(session.context, max_tokens=9)
    again.adopt(session.context, list(session.ids))
    again.history = list(session.history)
    session.max_tokens = 9
    assert said(again, "And then?") == said(session, "And then?")


def test_an_answer_that_is_cut_off_shows_no_half_of_its_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session(prefill(model("raw"), source(60)))
    count = session.context.loaded.tokenizer(" Anna.\n\nQues", add_special_tokens=False)
    session.max_tokens = len(count["input_ids"])
    scripted(monkeypatch, session, " Anna.\n\nQuestion:")
    assert said(session, "Who?") == " Anna."
    assert session.history[0].ended == "max-tokens"
    assert session.context.loaded.tokenizer.decode(session.ids).endswith("Answer: Anna.")
    assert session.cache.get_seq_length() == session.length


@pytest.mark.parametrize("tokens", range(1, 13))
def test_an_answer_that_is_cut_inside_a_character_ends_before_it(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(prefill(model("llama"), source(60)), max_tokens=tokens)
    scripted(monkeypatch, session, "你好，这")
    answer = said(session, "Who?")
    assert "你好，这".startswith(answer)
    assert len(answer) == tokens // 3
    assert session.history[0].answer == answer


# ---- growing -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told() -> tuple[Context, list[str], list[list[Question]]]:
    """A small compact context of pocket, two more registers, and questions about each of them."""
    loaded = model("pocket")

    def measure(texts: list[str]) -> list[int]:
        return [len(loaded.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]

    documents = [generate(f"grow/{i}", 260, measure, 1) for i in (0, 2, 3)]
    context = prefill(loaded, Source("doc.txt", documents[0].text))
    compact(context, Request(ratio=4, queries="repeat"), errors=False).apply()
    asked = [Questioner(d).distinct(Random(1), "direct", 3) for d in documents]
    return context, [d.text for d in documents], asked


def test_what_was_told_is_still_known_after_compactions_and_in_a_file(
    told: tuple[Context, list[str], list[list[Question]]], tmp_path: Path
) -> None:
    context, texts, asked = told
    session = Session(context, max_tokens=24)
    before, tokens = context.cache.nbytes(), 0
    for text in texts[1:]:
        said(session, text)
        tokens += len(session.ids)
        live = session.cache.nbytes() - session.context.cache.nbytes()
        found = grow(session, 8, progress=Silent())
        assert found.full == live
        assert found.ratio >= 8
    assert session.length == session.cache.get_seq_length() == context.T + tokens
    assert session.cache.nbytes() < before + tokens * 9216 / 8 * 1.01
    path = tmp_path / "grown.amkv"
    growing.save(session, path, overwrite=False)
    with AmkvFile.open(path) as file:
        file.verify()
        assert file.manifest["boundary"] == "turn_closed"
        assert file.manifest["conversation"] == {"turns": 2, "tokens": tokens}
        assert file.manifest["document_end"] == context.document_end
    with Artifact.open(path) as artifact:
        restored = Session(restore(artifact, context.loaded), max_tokens=24)
    for question in (q for part in asked for q in part):
        assert said(session, question.question) == question.answer
        assert said(restored, question.question) == question.answer


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "raw"])
def test_nothing_is_lost_where_everything_is_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a method that keeps every key, a conversation goes on as if nothing had happened."""

    def keep(context: Context, options: Request, **more: Any) -> Any:
        kept = replace(options, method="keep", ratio=None, queries=None)
        return compact(context, kept, **more)

    monkeypatch.setattr(growing, "compact", keep)
    context = prefill(model(name), source(40))
    plain, grown = (Session(context, max_tokens=6) for _ in range(2))
    for question in ("Who lives here?", "And then?"):
        assert said(grown, question) == said(plain, question)
        grow(grown, 1, progress=Silent())
    assert grown.length == plain.length
    ids = plain.prompt_ids("Why?")
    assert grown.prompt_ids("Why?") == ids
    logits = [
        run(context.loaded.model, s.cache.fork(), torch.tensor([ids]), logits_to_keep=1).logits
        for s in (plain, grown)
    ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
    growing.save(grown, tmp_path / "x.amkv", overwrite=False)
    with Artifact.open(tmp_path / "x.amkv") as artifact:
        restored = Session(restore(artifact, context.loaded), max_tokens=6)
    assert said(restored, "Why?") == said(plain, "Why?")


def test_an_interrupted_compaction_changes_nothing(
    told: tuple[Context, list[str], list[list[Question]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, _, asked = told
    session = Session(context, max_tokens=24)
    question = asked[0][0]
    said(session, question.question)
    ids, held = list(session.ids), session.cache.nbytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(growing, "appended", interrupted)
        with pytest.raises(KeyboardInterrupt):
            grow(session, progress=Silent())
    assert (session.ids, session.cache.nbytes(), session.settled) == (ids, held, 0)
    assert said(session, question.question) == question.answer


def test_turns_that_were_compacted_stay_and_a_reset_forgets_them(
    told: tuple[Context, list[str], list[list[Question]]],
) -> None:
    context, _, asked = told
    session = Session(context, max_tokens=24)
    said(session, asked[0][0].question)
    grow(session, progress=Silent())
    with pytest.raises(UsageError, match="the turns before were compacted"):
        session.undo()
    with pytest.raises(UsageError, match="nothing was said since"):
        grow(session, progress=Silent())
    session.reset()
    assert (session.context, session.history, session.length) == (context, [], context.T)


def test_a_context_whose_keys_are_turned_by_its_length_is_not_saved(tmp_path: Path) -> None:
    context = prefill(model("llama"), source(40))
    geometry = replace(context.loaded.geometry, rope={"rope_type": "dynamic"}, turned_for=context.T)
    session = Session(replace(context, loaded=replace(context.loaded, geometry=geometry)))
    session.context = replace(session.context, ids=[*context.ids, 5])
    with pytest.raises(UsageError, match="turns keys by the length"):
        growing.save(session, tmp_path / "x.amkv", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_thoughts_are_told_from_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(prefill(model("llama"), source(60)))
    loaded = session.context.loaded
    reply = "<think>\nWho? A lynx.\n</think>\n\nAnna."
    ids = loaded.tokenizer(reply, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(type(loaded.chat), "marks", MARKS[0])
    monkeypatch.setattr("amcli.pipeline.talk.session.stream", lambda *a, **o: (i for i in ids))
    heard: list[str] = []
    session.thought = heard.append
    assert said(session, "Who owns it?") == "Anna."
    assert "".join(heard) == session.history[0].thoughts == "Who? A lynx."
    assert session.history[0].answer == "Anna."
