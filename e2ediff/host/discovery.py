"""Which plugins are installed, read from metadata alone: nothing of theirs is imported here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from importlib import metadata

import attrs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from e2ediff import __version__

GROUP = "e2ediff"
"""The entry point group of plugins."""

BUILTIN = "e2ediff"
"""The plugin that our own parts belong to; nobody may take their names."""


@attrs.frozen
class Entry:
    """An entry point of the group `e2ediff`.

    `name` is unique among all that are installed; `entry` is the name that its distribution
    gave it, `value` the module (or `module:object`), `requires` the distribution's requirements.
    """

    name: str
    entry: str
    value: str
    distribution: str = ""
    version: str = ""
    requires: tuple[str, ...] = ()

    def answers(self, word: str) -> bool:
        """Whether a user who writes `word` can mean this plugin."""
        same = word in (self.name, self.entry)
        return same or canonicalize_name(word) == canonicalize_name(self.distribution)

    def load(self) -> object:
        """Import the module."""
        return metadata.EntryPoint(self.entry, self.value, GROUP).load()

    def refusal(self) -> str:
        """Why this plugin is not imported at all: blocked, or for another e2ediff; "" if it is.

        Plugins are blocked by the environment variable E2EDIFF_BLOCK, which lists entry points
        and distributions, separated by commas.
        """
        if any(self.answers(word) for word in words("E2EDIFF_BLOCK")):
            return "blocked by E2EDIFF_BLOCK"
        for line in self.requires:
            try:
                wanted = Requirement(line)
            except InvalidRequirement:
                continue
            if canonicalize_name(wanted.name) != "e2ediff":
                continue
            if not wanted.specifier.contains(__version__, prereleases=True):
                return f"needs {line}, this is e2ediff {__version__}"
        return ""

    @property
    def blocked(self) -> bool:
        """Whether the user keeps it out."""
        return self.refusal().startswith("blocked")

    def missing(self) -> str:
        """The first requirement that is not installed, as pip takes it; "" if all are."""
        for line in self.requires:
            try:
                wanted = Requirement(line)
                if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                    metadata.distribution(wanted.name)
            except InvalidRequirement:
                continue
            except metadata.PackageNotFoundError:
                return line
        return ""


def words(variable: str) -> list[str]:
    """What an environment variable lists, separated by commas."""
    return [word.strip() for word in os.environ.get(variable, "").split(",") if word.strip()]


def installed() -> list[Entry]:
    """Every installed plugin, in a fixed order, by names of which no two are equal."""
    found = sorted(_entries(), key=lambda e: (e.entry, e.distribution))
    count = Counter([BUILTIN, *(e.entry for e in found)])
    return [
        attrs.evolve(e, name=f"{e.distribution}/{e.entry}")
        if count[e.entry] > 1 and e.distribution
        else e
        for e in found
    ]


def _entries() -> Iterator[Entry]:
    for point in metadata.entry_points(group=GROUP):
        if point.dist is None:
            yield Entry(point.name, point.name, point.value)
            continue
        requires = tuple(point.dist.requires or ())
        yield Entry(
            point.name, point.name, point.value, point.dist.name, point.dist.version, requires
        )
