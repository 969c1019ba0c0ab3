"""Read plugins in folders, and give the command that installs them.

Their sources are read but not imported: a command run in a folder must not execute the code that
happens to be there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

import attrs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from e2ediff.errors import PluginError
from e2ediff.host.discovery import GROUP, missing
from e2ediff.host.guard import cause


@attrs.frozen
class PluginFolder:
    """A folder with a `pyproject.toml` that has entry points of the group `e2ediff`.

    `entries` has the module (or `module:object`) of each entry point by its name.
    """

    folder: Path
    name: str
    version: str
    requires: tuple[str, ...]
    entries: dict[str, str]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Self:
        """Read `pyproject.toml`.

        Raises:
            PluginError: There is none, or it names no plugin.
        """
        path = Path(os.path.abspath(folder)) / "pyproject.toml"
        try:
            project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
            points = project.get("entry-points", {}).get(GROUP, {})
            entries = {str(name): str(value) for name, value in points.items()}
            name, version = str(project["name"]), str(project.get("version", "0"))
            requires = tuple(map(str, project.get("dependencies", ())))
        except FileNotFoundError as exc:
            raise PluginError(f"{path}: no such file, so this folder is not a plugin") from exc
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
            raise PluginError(f"{path}: cannot be read as a project ({cause(exc)})") from exc
        if not entries:
            raise PluginError(
                f'{path}: has no plugin; add\n[project.entry-points.{GROUP}]\nNAME = "MODULE"'
            )
        return cls(path.parent, name, version, requires, entries)

    def matches(self, word: str) -> bool:
        """Return whether `word` may refer to this plugin."""
        return word in self.entries or canonicalize_name(word) == canonicalize_name(self.name)

    def satisfies(self, wanted: Requirement) -> bool:
        """Return whether installing it meets a requirement."""
        same = canonicalize_name(wanted.name) == canonicalize_name(self.name)
        return same and wanted.specifier.contains(self.version, prereleases=True)

    def parts(self, plural: str) -> list[str]:
        """Return the names of the parts of this kind that its source appears to register."""
        call = re.compile(rf"""add\(\s*["']{plural}["']\s*,\s*["']([^"']+)["']""")
        found = set[str]()
        for value in self.entries.values():
            module = value.partition(":")[0].replace(".", "/")
            for file in (f"{module}.py", f"{module}/__init__.py"):
                for path in (self.folder / file, self.folder / "src" / file):
                    with contextlib.suppress(OSError, ValueError):
                        found |= {*call.findall(path.read_text(encoding="utf-8"))}
        return sorted(found)

    @property
    def install(self) -> str:
        """Return the command that installs it from the current folder."""
        inside = Path.cwd() in self.folder.parents
        return pip_install(os.path.relpath(self.folder) if inside else str(self.folder))


def pip_install(folder: str | os.PathLike[str]) -> str:
    """Return the shell command that installs a folder, spelled so that pip takes it for a path.

    The path is quoted.
    """
    path = os.fspath(folder)
    if re.search(r"[;\[\]]", path):  # characters with a special meaning for pip
        path = Path(path).absolute().as_uri()
    elif path not in (".", "..") and (os.sep not in path or path.startswith(("-", "~"))):
        path = f".{os.sep}{path}"
    return f"pip install {shlex.quote(path)}"


def install_command(requirement: str, near: Iterable[str] = ()) -> str:
    """Return the command that installs a distribution, from its folder if that is known.

    No name of e2ediff or of a plugin named after it is given to pip to look up: they are on no
    package index, so whatever an index has under such a name is someone else's.
    """
    with contextlib.suppress(InvalidRequirement):
        wanted = Requirement(requirement)
        for found in uninstalled_plugins(near):
            if found.satisfies(wanted):
                return found.install
        name = canonicalize_name(wanted.name)
        if name.partition("-")[0] == "e2ediff":
            return (
                f"{pip_install(name)} in the folder that contains it; plugins of e2ediff itself "
                "are in plugins/ of its repository, and on no package index"
            )
    return f"pip install {shlex.quote(requirement)}"


def install_hint(error: BaseException, requires: Sequence[str]) -> str:
    """Return what to install after a failed import of a plugin with these requirements, or ""."""
    if isinstance(error, ImportError) and (lacking := missing(requires)):
        return f"; run: {install_command(lacking)}"
    return ""


def uninstalled_plugins(near: Iterable[str] = ()) -> Iterator[PluginFolder]:
    """Find plugins in folders `plugins` that are not installed.

    They are searched for in the current folder, in those of the files `near`, in the checkout from
    which e2ediff was installed, and in all folders above these. In the first two, folders
    `e2ediff-NAME`, as `plugins new` makes them, count too.
    """
    starts = [Path.cwd(), *(Path(file).absolute().parent for file in near if os.path.exists(file))]
    seen = set[Path]()
    for start in [*starts, *_own_checkout()]:
        for folder in (start, *start.parents):
            if folder in seen:
                break
            seen.add(folder)
            projects = sorted(folder.glob("plugins/*/pyproject.toml"))
            if folder in starts:
                projects += sorted(folder.glob("e2ediff-*/pyproject.toml"))
            for project in projects:
                try:
                    found = PluginFolder.read(project.parent)
                except PluginError:
                    continue
                if not _is_installed(found.name):
                    yield found


def _own_checkout() -> Iterator[Path]:
    """Yield the folders of this e2ediff, and of the source that pip installed."""
    yield Path(__file__).absolute().parent
    try:
        noted = json.loads(metadata.distribution("e2ediff").read_text("direct_url.json") or "{}")
        url = urlsplit(str(noted.get("url", "")))
    except (metadata.PackageNotFoundError, OSError, ValueError, AttributeError):
        return
    if url.scheme == "file":
        yield Path(unquote(url.path))


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    except ValueError:  # an empty name
        return True
    return True
