"""Load a plugin that is one Python file, given with `--plugin` and not installed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from e2ediff.errors import PluginError
from e2ediff.host.discovery import Plugin
from e2ediff.host.registry import boundary

VARIABLE = "E2EDIFF_PLUGIN_FILES"
"""Environment variable that lists files, separated as in PATH; further processes inherit it."""

HASHED = "sha256:"
"""How the version of such a plugin begins."""


def given_files() -> list[str]:
    """Return the plugin files that the environment lists."""
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


@contextlib.contextmanager
def giving(paths: Sequence[str]) -> Iterator[None]:
    """Add files to the environment's list inside the block, also for child processes.

    Raises:
        PluginError: A path contains the path separator, or is not a file.
    """
    found, before = given_files(), os.environ.get(VARIABLE)
    for path in paths:
        full = os.path.abspath(path)
        if os.pathsep in full:
            raise PluginError(f"--plugin {path}: the path must not contain {os.pathsep!r}")
        if not os.path.isfile(full):
            raise PluginError(f"--plugin {path}: there is no such file")
        if full not in found:
            found.append(full)
    os.environ[VARIABLE] = os.pathsep.join(found)
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def read_plugin_file(path: str) -> tuple[ModuleType, Plugin]:
    """Run a plugin's file; return its module and its plugin, named like the file without `.py`.

    Raises:
        PluginError: It cannot be read, or raises.
    """
    file = Path(path)
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise PluginError(f"{path}: name a plugin file like a Python module: my_objective.py")
    try:
        text = file.read_bytes()
    except OSError as exc:
        raise PluginError(f"{path}: cannot be read ({exc.strerror})") from exc
    version = f"{HASHED}{hashlib.sha256(text).hexdigest()}"
    plugin = Plugin(file.stem, version=version, file=path, text=text)
    # Python resolves annotations through sys.modules; the name is one that no package has.
    name = f"e2ediff_plugin_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with boundary(plugin):
            spec.loader.exec_module(module)
    except PluginError as exc:
        raise PluginError(f"{path}{_line(exc.__cause__, path)}: {exc}") from exc.__cause__
    return module, plugin


def _line(error: BaseException | None, path: str) -> str:
    """Return `:12`, the last line of the file in a traceback; "" if there is none."""
    assert error is not None
    if isinstance(error, SyntaxError) and error.filename == path:
        return f":{error.lineno}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_filename == path]  # fmt: skip
    return f":{lines[-1]}" if lines else ""
