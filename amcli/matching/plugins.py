"""Methods of other packages, which name them as entry points of the group `amkv.methods`:

    [project.entry-points."amkv.methods"]
    value-norm = "mypackage.value_norm:VALUE_NORM"

on the left its name, on the right where the `Method` of that name is. Names are read
from what pip has installed, without importing a package, and without torch; `methods.get` imports
the one that is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from amcli.matching.catalogue import METHODS

GROUP = "amkv.methods"


@dataclass(frozen=True)
class Plugin:
    """A method of another package, not loaded: its name, the package's, and where it is."""

    name: str
    package: str
    entry: metadata.EntryPoint

    def load(self) -> object:
        """What stands at that place. Raises whatever importing the package raises."""
        return self.entry.load()


def plugins() -> list[Plugin]:
    """What packages bring, in the order of the module path; those of taken names too."""
    found: dict[str, list[Plugin]] = {}
    for distribution in metadata.distributions():
        try:
            entries = distribution.entry_points.select(group=GROUP)
            package = str(distribution.metadata["Name"]) if entries else ""
        except Exception:  # what one package says of itself must not stand in the way of others
            continue
        if entries and package not in found:  # one that is there twice is imported from the first
            found[package] = [Plugin(entry.name, package, entry) for entry in entries]
    return [plugin for several in found.values() for plugin in several]


def names() -> list[str]:
    """Names of all methods, those of other packages last."""
    return list(dict.fromkeys([*METHODS, *(plugin.name for plugin in plugins())]))
