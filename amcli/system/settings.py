"""The user's defaults: a configuration file and environment variables, overridden by options.

The first of these that is set wins: the option on the command line; the variable `AMKV_…`; the
command's table in `$XDG_CONFIG_HOME/amkv/config.toml`; the top of that file; the built-in default.

    model = "Qwen/Qwen3-4B"        # AMKV_MODEL
    device = "cuda"                # AMKV_DEVICE

    [compact]
    ratio = 50                     # AMKV_RATIO

Standard library only: help and completion must stay instant.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amcli.errors import UsageError, did_you_mean

PREFIX = "AMKV_"

SETTINGS: dict[str, tuple[str, ...]] = {
    "model": ("prefill", "compact", "eval"),
    "device": ("prefill", "compact", "chat", "eval"),
    "dtype": ("prefill", "compact", "chat", "eval"),
    "method": ("compact",),
    "ratio": ("compact",),
    "budget": ("compact",),
    "queries": ("compact",),
    "store": ("compact",),
    "seed": ("compact", "chat"),
    "max-tokens": ("chat",),
    "temperature": ("chat",),
}
"""What can be set, and for which commands. `eval` measures only what its options say."""

_TYPED = ("trust-remote-code", "force")
"""Options that cannot be set: they are a deliberate choice for one command."""


@dataclass(frozen=True)
class Setting:
    """A value that was set; `origin` names the variable, or the file and the key."""

    value: Any
    origin: str


def path() -> Path:
    """Where the configuration file is, or would be."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # The specification says to ignore relative paths.
    folder = Path(base) if os.path.isabs(base) else Path("~/.config").expanduser()
    return folder / "amkv" / "config.toml"


def of(command: str) -> dict[str, Setting]:
    """The settings of a command, by name.

    Raises UsageError for a configuration file that cannot be read or sets something unknown.
    """
    file = path()
    record = _read(file)
    _check(file, record)
    table = record.get(command, {})
    found: dict[str, Setting] = {}
    for name, commands in SETTINGS.items():
        if command not in commands:
            continue
        for place, values in ((f"[{command}] {name}", table), (name, record)):
            if name in values:
                found[name] = Setting(values[name], f"{file}, {place}")
                break
        variable = variable_of(name)
        if text := os.environ.get(variable):
            found[name] = Setting(text, variable)
    return found


def unknown_variables() -> Iterator[str]:
    """A warning for each variable that looks like a setting but is not one."""
    known = [variable_of(name) for name in SETTINGS]
    for variable in sorted(os.environ):
        if variable.startswith(PREFIX) and variable not in known:
            near = difflib.get_close_matches(variable, known, n=1)
            yield f"{variable} is set, and is no setting" + "".join(f"; {n} is" for n in near)


def variable_of(name: str) -> str:
    """The variable that sets `name`, such as `AMKV_MAX_TOKENS`."""
    return PREFIX + name.upper().replace("-", "_")


def _read(file: Path) -> dict[str, Any]:
    """The file, with `-` for `_` in its keys; empty if there is none."""
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(
            f"cannot read {file}: {error.strerror}",
            "mend or move it",
            code="settings-unreadable",
            path=file,
        ) from error
    try:
        record = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file} is not valid TOML: {error}", f"edit {file}", code="settings-invalid", path=file
        ) from error
    return {
        _dashed(name): {_dashed(k): v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in record.items()
    }


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _check(file: Path, record: Mapping[str, Any]) -> None:
    commands = {command for names in SETTINGS.values() for command in names}
    for name, value in record.items():
        if isinstance(value, dict):
            if name not in commands:
                raise _unknown(file, f"[{name}]", name, commands, "tables")
            allowed = [setting for setting, names in SETTINGS.items() if name in names]
            for key, inner in value.items():
                _check_one(file, f"[{name}] {key}", key, inner, allowed)
        else:
            _check_one(file, name, name, value, list(SETTINGS))


def _check_one(file: Path, place: str, name: str, value: Any, allowed: list[str]) -> None:
    if name in _TYPED:
        raise UsageError(
            f"{file}: {name} cannot be set",
            f"take it out of {file}",
            code="setting-only-typed",
            path=file,
            name=name,
        )
    if name not in allowed:
        raise _unknown(file, place, name, allowed, "settings")
    if not isinstance(value, (str, int, float)):
        raise UsageError(
            f"{file}: {place} is {value!r}, not a word or a number",
            f'for example {name} = "…"',
            code="settings-invalid",
            path=file,
            name=name,
        )


def _unknown(
    file: Path, place: str, name: str, known: list[str] | set[str], what: str
) -> UsageError:
    return UsageError(
        f"{file}: there is no setting {place}",
        f"{did_you_mean(name, sorted(known))}{what}: {', '.join(sorted(known))}",
        code="unknown-setting",
        path=file,
        name=name,
    )
