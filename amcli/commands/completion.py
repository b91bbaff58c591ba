"""What the shell offers after Tab. Nothing heavy is imported: it has to keep up with typing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from amcli.matching import plugins
from amcli.models.catalogue import POCKET

Completion = Callable[[str], list[str]]


def among(names: Iterable[str]) -> Completion:
    """Offers the names that begin with what is typed."""

    def offer(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return offer


def several(names: Iterable[str]) -> Completion:
    """The same for names separated by commas: completes the last one."""
    offer = among(names)

    def offer_last(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in offer(last)]

    return offer_last


def methods(incomplete: str) -> list[str]:
    """Offers methods, including those of other packages."""
    return among(plugins.names())(incomplete)


def several_methods(*besides: str) -> Completion:
    """Offers methods separated by commas, and the names in `besides`."""

    def offer(incomplete: str) -> list[str]:
        return several((*plugins.names(), *besides))(incomplete)

    return offer


def artifacts(incomplete: str) -> list[str]:
    """Offers `.amkv` files, and folders that may hold some."""
    return [*_paths(incomplete, lambda p: p.suffix == ".amkv"), *_folders(incomplete)]


def models(incomplete: str) -> list[str]:
    """Offers pocket, models in the local hub cache, folders with a model, GGUF files."""
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "hub"
    )
    prefix = "models--"
    try:
        held = sorted(name for name in os.listdir(cache) if name.startswith(prefix))
    except OSError:
        held = []
    ids = [name.removeprefix(prefix).replace("--", "/") for name in held]
    folders = _paths(incomplete, lambda p: p.suffix == ".gguf" or (p / "config.json").is_file())
    return [*among([POCKET, *ids])(incomplete), *folders]


def _folders(incomplete: str) -> list[str]:
    return [f"{path}/" for path in _paths(incomplete, Path.is_dir)]


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Paths that begin with what is typed, spelled that way; hidden ones only after a typed dot."""
    folder, name = os.path.split(incomplete)
    try:
        names = sorted(os.listdir(os.path.expanduser(folder) or "."))
    except OSError:
        return []
    return [
        os.path.join(folder, found)
        for found in names
        if found.startswith(name)
        and (name.startswith(".") or not found.startswith("."))
        and wanted(Path(os.path.expanduser(folder), found))
    ]
