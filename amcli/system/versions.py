"""Which versions are in use, without importing the packages, which would take seconds."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from amcli.system import settings
from amcli.system.version import VERSION


def text() -> str:
    """Versions for people, with `amkv` and its version on the first line."""
    file = settings.path()
    libraries = [f"python {platform.python_version()}"]
    libraries += [f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors")]
    there = "" if file.is_file() else " (not there)"
    return (
        f"amkv {VERSION}\n{', '.join(libraries)}\n{accelerator()}\nconfiguration: {file}{there}\n"
    )


def tools() -> dict[str, str]:
    """Versions of the tools that make an artifact, as in its manifest."""
    found = {"amkv": VERSION, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def version(name: str) -> str:
    """The version of an installed package, or a note that it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def accelerator() -> str:
    """What PyTorch was built for, such as `CUDA 12.8`: read from a file, without the driver."""
    spec = find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or ():
        try:
            said = (Path(folder) / "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        for name, label in (("cuda", "CUDA"), ("hip", "ROCm")):
            found = re.search(rf"^{name}\b[^=]*=\s*['\"]([^'\"]+)['\"]", said, re.MULTILINE)
            if found is not None:
                return f"PyTorch is built for {label} {found[1]}"
    return "PyTorch is built for CPUs only: no CUDA"
