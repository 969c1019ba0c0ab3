"""Find installed plugins from their metadata, without importing them.

Metadata may be damaged, too; that affects only the distribution it belongs to.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import attrs
from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from e2ediff import __version__
from e2ediff.errors import PluginError
from e2ediff.host.guard import cause

GROUP = "e2ediff"
"""The entry point group of plugins."""

BUILTIN = "e2ediff"
"""The plugin that our own parts belong to; nobody may take their names."""


@attrs.frozen
class Entry:
    """An entry point of the group `e2ediff`.

    `name` is unique among all that are installed; `entry` is the name that its distribution
    gave it, `value` the module (or `module:object`), `requires` the distribution's requirements,
    `summary` its line about itself.
    `fault` is what is wrong with its metadata, in one line, "" if nothing.
    """

    name: str
    entry: str
    value: str
    distribution: str = ""
    version: str = ""
    requires: tuple[str, ...] = ()
    fault: str = ""
    summary: str = ""

    def matches(self, word: str) -> bool:
        """Return whether `word` may refer to this plugin."""
        same = word in (self.name, self.entry)
        return same or canonicalize_name(word) == canonicalize_name(self.distribution)

    def load(self) -> object:
        """Import the module."""
        return metadata.EntryPoint(self.entry, self.value, GROUP).load()

    def refusal(self) -> str:
        """Return why this plugin is not imported, "" if it is.

        It may be blocked, have damaged metadata, or be for another version of e2ediff.

        Plugins are blocked by the environment variable E2EDIFF_BLOCK, which lists entry points
        and distributions, separated by commas.
        """
        if any(self.matches(word) for word in words("E2EDIFF_BLOCK")):
            return "blocked by E2EDIFF_BLOCK"
        if self.fault:
            return self.fault
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
        """Return whether the user blocks it."""
        return self.refusal().startswith("blocked")


def missing(requires: Sequence[str]) -> str:
    """Return the first requirement that is not installed, as for pip; "" if all are."""
    for line in requires:
        try:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                metadata.distribution(wanted.name)
        except (InvalidRequirement, UndefinedComparison, UndefinedEnvironmentName):
            continue
        except metadata.PackageNotFoundError:
            return line
    return ""


def words(variable: str) -> list[str]:
    """Split the comma-separated list in an environment variable."""
    return [word.strip() for word in os.environ.get(variable, "").split(",") if word.strip()]


def installed() -> list[Entry]:
    """Return every installed plugin, in a fixed order, with unique names."""
    found = sorted(_entries(), key=lambda e: (e.entry, e.distribution))
    count = Counter([BUILTIN, *(e.entry for e in found)])
    return [
        attrs.evolve(e, name=f"{e.distribution}/{e.entry}")
        if count[e.entry] > 1 and e.distribution
        else e
        for e in found
    ]


def version_of(name: str) -> str:
    """Return the version of an installed distribution.

    Raises:
        PackageNotFoundError: There is none of this name.
        PluginError: Its metadata cannot be read, or has no valid version.
    """
    found = metadata.distribution(name)
    try:
        return str(Version(found.version))
    except Exception as exc:  # a stranger's metadata
        raise PluginError(_fault("METADATA", _folder(found), exc)) from exc


def broken_distribution() -> str:
    """Name a distribution whose damaged metadata makes all entry points unreadable; "" if none.

    Even `import torch` fails then, so nothing works until it is repaired.
    """
    try:
        metadata.entry_points(group=GROUP)
    except Exception as failed:  # arbitrary metadata, as below
        for distribution in metadata.distributions():
            try:
                _ = distribution.entry_points
            except Exception as exc:
                fault = _fault("entry_points.txt", _folder(distribution), exc)
                return f"torch cannot be imported: {fault}"
        return f"torch cannot be imported: the metadata of a distribution is damaged ({failed!r})"
    return ""


def _entries() -> Iterator[Entry]:
    """Yield all entry points of the group; of equal distributions the first on the path counts."""
    seen: set[str] = set()
    for distribution in metadata.distributions():
        found = _entries_of(distribution)
        names = {canonicalize_name(e.distribution) for e in found}
        if not names & seen and not any(_shadowed(distribution, name) for name in names):
            yield from found
        seen |= names


def _entries_of(distribution: metadata.Distribution) -> Sequence[Entry]:
    """Return its entry points of the group, with a fault if its metadata cannot be read."""
    if f"[{GROUP}]" not in _declared(distribution):
        return ()
    folder = _folder(distribution)
    own = folder.name.partition("-")[0]
    try:
        points = list(distribution.entry_points.select(group=GROUP))
        if len({p.name for p in points}) < len(points):
            raise ValueError("two entry points have one name")
    except Exception as exc:  # arbitrary metadata, here and below
        return [Entry(own, own, "", own, fault=_fault("entry_points.txt", folder, exc))]
    try:
        name, version = distribution.metadata["Name"], distribution.version or ""
        requires = tuple(distribution.requires or ())
        summary = distribution.metadata["Summary"] or ""
        if not name:
            raise ValueError("there is no Name")
    except Exception as exc:
        fault = _fault("METADATA", folder, exc)
        return [Entry(p.name, p.name, p.value, own, fault=fault) for p in points]
    return [
        Entry(p.name, p.name, p.value, name, version, requires, summary=summary) for p in points
    ]


def _declared(distribution: metadata.Distribution) -> str:
    """Read the text of its entry points, which may hold arbitrary bytes."""
    try:
        return distribution.read_text("entry_points.txt") or ""
    except UnicodeDecodeError as exc:
        return exc.object.decode(errors="replace")
    except OSError:
        return ""  # as importlib.metadata treats an unreadable file


def _folder(distribution: metadata.Distribution) -> Path:
    """Return the folder of its metadata, for which importlib.metadata has no public name."""
    return Path(getattr(distribution, "_path", "unknown"))


def _fault(file: str, folder: Path, exc: Exception) -> str:
    return (
        f"{folder / file} cannot be read ({cause(exc)}); reinstall its distribution or remove it"
    )


def _shadowed(distribution: metadata.Distribution, name: str) -> bool:
    """Return whether a distribution of this name comes earlier on Python's path."""
    first = next(iter(metadata.distributions(name=name)), distribution)
    return first.locate_file("") != distribution.locate_file("")
