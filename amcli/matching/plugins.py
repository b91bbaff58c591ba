"""Methods of other packages, which name them as entry points of the group `amkv.methods`:

    [project.entry-points."amkv.methods"]
    value-norm = "mypackage.value_norm:VALUE_NORM"

The name is on the left, the place of its `Method` on the right. Names are read from the metadata
of installed packages, without importing a package or torch; `methods.get` imports the one asked
for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from amcli.matching.catalogue import METHODS

GROUP = "amkv.methods"


@dataclass(frozen=True)
class Plugin:
    """A method of another package, not loaded: its name, the package's name, and where it is."""

    name: str
    package: str
    entry: metadata.EntryPoint

    def load(self) -> object:
        """The object at that place. Raises whatever importing the package raises."""
        return self.entry.load()


def plugins() -> list[Plugin]:
    """The methods of all packages, in module path order, even with names already taken."""
    found: dict[str, list[Plugin]] = {}
    for distribution in metadata.distributions():
        try:
            entries = distribution.entry_points.select(group=GROUP)
            package = str(distribution.metadata["Name"]) if entries else ""
        except Exception:  # one package's broken metadata must not hide the others
            continue
        if entries and package not in found:  # found twice: the first is imported
            found[package] = [Plugin(entry.name, package, entry) for entry in entries]
    return [plugin for several in found.values() for plugin in several]


def names() -> list[str]:
    """Names of all methods, those of other packages last."""
    return list(dict.fromkeys([*METHODS, *(plugin.name for plugin in plugins())]))
