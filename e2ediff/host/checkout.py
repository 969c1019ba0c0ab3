"""Find plugins in folders that are not installed, and the command that installs them.

Their sources are read but not imported: a command run in a folder must not execute the code that
happens to be there.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import attrs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from e2ediff.host.discovery import GROUP, missing


@attrs.frozen
class UninstalledPlugin:
    """A plugin's folder: its distribution, and its modules by the names of its entry points."""

    folder: Path
    name: str
    version: str
    modules: dict[str, str]

    def matches(self, word: str) -> bool:
        """Return whether `word` may refer to this plugin."""
        return word in self.modules or canonicalize_name(word) == canonicalize_name(self.name)

    def satisfies(self, wanted: Requirement) -> bool:
        """Return whether installing it meets a requirement."""
        same = canonicalize_name(wanted.name) == canonicalize_name(self.name)
        return same and wanted.specifier.contains(self.version, prereleases=True)

    def parts(self, plural: str) -> list[str]:
        """Return the names of the parts of this kind that its source appears to register."""
        found = set[str]()
        for value in self.modules.values():
            path = self.folder / value.partition(":")[0].replace(".", "/")
            root = self.folder / "src" / path.relative_to(self.folder)
            for base in (path, root):
                found |= _added(base.with_suffix(".py"), plural)
                found |= _added(base / "__init__.py", plural)
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
    """Return the command that installs a distribution, from its folder if that is known."""
    with contextlib.suppress(InvalidRequirement):
        wanted = Requirement(requirement)
        for found in uninstalled_plugins(near):
            if found.satisfies(wanted):
                return found.install
    return f"pip install {shlex.quote(requirement)}"


def install_hint(error: BaseException, requires: Sequence[str]) -> str:
    """Return what to install after a failed import of a plugin with these requirements, or ""."""
    if isinstance(error, ImportError) and (lacking := missing(requires)):
        return f"; run: {install_command(lacking)}"
    return ""


def uninstalled_plugins(near: Iterable[str] = ()) -> Iterator[UninstalledPlugin]:
    """Find plugins in folders `plugins` that are not installed.

    They are searched for in the current folder, in those of the files `near`, in the checkout from
    which e2ediff was installed, and in all folders above these.
    """
    starts = [Path.cwd(), *(Path(file).absolute().parent for file in near if os.path.exists(file))]
    seen = set[Path]()
    for start in [*starts, *_own_checkout()]:
        for folder in (start, *start.parents):
            if folder in seen:
                break
            seen.add(folder)
            for project in sorted(folder.glob("plugins/*/pyproject.toml")):
                if (found := _read(project)) and not _is_installed(found.name):
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


def _read(project: Path) -> UninstalledPlugin | None:
    """Read a pyproject.toml, if it belongs to a plugin."""
    try:
        said = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        entries = {str(k): str(v) for k, v in said["entry-points"][GROUP].items()}
        return UninstalledPlugin(
            project.parent, str(said["name"]), str(said.get("version", "0")), entries
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _added(file: Path, plural: str) -> set[str]:
    """Return the names of the parts of this kind that the `register` in a file's source adds."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return set()
    calls = (
        [a.value for a in node.args[:2] if isinstance(a, ast.Constant)]
        for hook in tree.body
        if isinstance(hook, ast.FunctionDef) and hook.name == "register"
        for node in ast.walk(hook)
        if isinstance(node, ast.Call)
    )
    return {str(words[1]) for words in calls if len(words) == 2 and words[0] == plural}
