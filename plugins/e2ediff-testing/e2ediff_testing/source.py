"""A plugin as it lies in its author's folder, before anybody has installed it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import Specifier
from packaging.utils import canonicalize_name
from packaging.version import Version

from e2ediff.errors import PluginError
from e2ediff.host.checkout import PluginFolder
from e2ediff.host.discovery import Plugin
from e2ediff.host.plugins import Host, load
from e2ediff.host.registry import boundary


@attrs.frozen
class Source(PluginFolder):
    """A plugin's folder, whose modules are imported from there."""

    def host(self) -> Host:
        """Make a host with this plugin; an installed copy of it is left alone.

        Raises:
            PluginError: It cannot be imported or registered.
        """
        root = self.folder / "src" if (self.folder / "src").is_dir() else self.folder
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
        host = load(instead={self.name: f"its folder {self.folder} is checked instead"})
        for name, value in self.entries.items():
            plugin = Plugin(name, self.name, self.version, entry=name, value=value)
            with boundary(plugin, f"plugin {name!r}: "):
                module = plugin.load()
            found = Path(getattr(module, "__file__", None) or root)
            if not found.resolve().is_relative_to(self.folder.resolve()):
                raise PluginError(
                    f"plugin {name!r}: {value} is imported from {found}, not from {self.folder}; "
                    "check the installed plugin by its name instead"
                )
            host.add(module, plugin)
        return host

    def problems(self) -> Iterator[str]:
        """Yield what a published package should not lack."""
        if not any(self.folder.glob("README*")):
            yield "there is no README; say what the plugin adds and how a recipe names it"
        if not any(p for p in self.folder.rglob("test_*.py") if ".venv" not in p.parts):
            yield "there is no test; call a check of e2ediff_testing in tests/test_....py"
        yield from unbounded(self.requires)


def unbounded(requires: tuple[str, ...]) -> Iterator[str]:
    """Yield what is wrong with a distribution's requirement of e2ediff."""
    for line in requires:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            yield f"{line!r} is no requirement as pip takes it"
            continue
        if canonicalize_name(wanted.name) == "e2ediff":
            if not any(_keeps_minor(s) for s in wanted.specifier):
                yield (
                    f"{line!r} has no upper bound below the next minor version, which may change "
                    "contracts below 1.0: write e2ediff>=0.1,<0.2"
                )
            return
    yield "it does not depend on e2ediff; add e2ediff>=0.1,<0.2 to its dependencies"


def _keeps_minor(specifier: Specifier) -> bool:
    """Return whether it refuses versions after some minor one; `~=0.1` goes on to 1.0."""
    if specifier.operator in ("<", "<=", "==", "==="):
        return specifier.version != "0.*"
    return specifier.operator == "~=" and len(Version(specifier.version).release) > 2
