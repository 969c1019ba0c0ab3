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
class Plugin:
    """Who registers parts: an installed plugin, a module, or a file given with `--plugin`.

    `name` is unique in a host, `hooks` are those that it implements.
    Of an installed one `entry` is the name that its distribution gave its entry point, `value`
    the module (or `module:object`), `requires` the distribution's requirements, `summary` its
    line about itself, and `fault` is what is wrong with its metadata, in one line, "" if nothing.
    Of a file `text` is its content, whose hash is the version.
    """

    name: str
    distribution: str = ""
    version: str = ""
    entry: str = attrs.field(default="", kw_only=True)
    value: str = attrs.field(default="", kw_only=True)
    requires: tuple[str, ...] = attrs.field(default=(), kw_only=True, repr=False)
    fault: str = attrs.field(default="", kw_only=True)
    summary: str = attrs.field(default="", kw_only=True, repr=False)
    file: str = attrs.field(default="", kw_only=True)
    text: bytes = attrs.field(default=b"", kw_only=True, repr=False)
    hooks: tuple[str, ...] = attrs.field(default=(), kw_only=True)

    def __str__(self) -> str:
        origin = f" ({self.distribution} {self.version})" if self.distribution else ""
        origin = f" ({self.file})" if self.file else origin
        return f"{self.name!r}{origin}"

    def matches(self, word: str) -> bool:
        """Return whether `word` may refer to this plugin."""
        same = word in (self.name, self.entry)
        return same or canonicalize_name(word) == canonicalize_name(self.distribution)

    def load(self) -> object:
        """Import what the entry point names."""
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


def installed() -> list[Plugin]:
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


def _entries() -> Iterator[Plugin]:
    """Yield all entry points of the group; of equal distributions the first on the path counts."""
    seen: set[str] = set()
    for distribution in metadata.distributions():
        found = _entries_of(distribution)
        names = {canonicalize_name(e.distribution) for e in found}
        if not names & seen and not any(_shadowed(distribution, name) for name in names):
            yield from found
        seen |= names


def _entries_of(distribution: metadata.Distribution) -> Sequence[Plugin]:
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
        fault = _fault("entry_points.txt", folder, exc)
        return [Plugin(own, own, entry=own, fault=fault)]
    try:
        about = distribution.metadata  # parsed anew at each access
        name, version, summary = about["Name"], about["Version"] or "", about["Summary"] or ""
        # Without such lines those of an egg, which are in a file of their own.
        requires = tuple(about.get_all("Requires-Dist") or distribution.requires or ())
        if not name:
            raise ValueError("there is no Name")
    except Exception as exc:
        fault = _fault("METADATA", folder, exc)
        return [Plugin(p.name, own, entry=p.name, value=p.value, fault=fault) for p in points]
    return [
        Plugin(
            p.name, name, version,
            entry=p.name, value=p.value, requires=requires, summary=summary,
        )
        for p in points
    ]  # fmt: skip


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
