"""A conversation as a file: markdown to read, JSON to process, by the file's suffix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amcli.errors import UsageError
from amcli.system.files import write_whole

if TYPE_CHECKING:
    from amcli.pipeline.talk.session import Session

FORM = 1
"""Version of the JSON format."""

ENDINGS = (".md", ".json")


def write(session: Session, paths: Sequence[Path], target: Path, overwrite: bool) -> None:
    """Writes all turns, whole or not at all.

    Raises UsageError for another suffix, or an existing file without `overwrite`.
    """
    ending = target.suffix.lower()
    if ending not in ENDINGS:
        raise UsageError(
            f"cannot tell what to write from the name {target.name}",
            "name a .md or .json file, or an .amkv file for the context with the conversation",
        )
    found = record(session, paths)
    text = json.dumps(found, ensure_ascii=False, indent=1) if ending == ".json" else markdown(found)
    write_whole(target, (text.rstrip() + "\n").encode(), overwrite)


def record(session: Session, paths: Sequence[Path]) -> dict[str, Any]:
    """The JSON record; `docs/json.md` describes it."""
    return {
        "amkv_chat": FORM,
        "context": [str(path) for path in paths],
        "document": session.context.source["name"],
        "model": session.context.loaded.id,
        "temperature": session.temperature,
        "seed": session.seed,
        "turns": [
            {
                "system": turn.system,
                "question": turn.question,
                "answer": turn.answer,
                "tokens": turn.tokens,
                "seconds": round(turn.seconds, 3),
                "ended": turn.ended,
            }
            for turn in session.history
        ],
    }


def markdown(found: dict[str, Any]) -> str:
    """The same as markdown, for reading."""
    lines = [f"# About {found['document']}", "", f"{found['model']}, {', '.join(found['context'])}"]
    told = None
    for turn in found["turns"]:
        if turn["system"] != told and turn["system"]:
            lines += ["", f"*{turn['system']}*"]
        told = turn["system"]
        asked = turn["question"].replace("\n", "\n> ")
        lines += ["", f"> {asked}", "", turn["answer"]]
    return "\n".join(lines)
