"""Write the files of a plugin, for `e2ediff plugins new`, from templates in this folder."""

from __future__ import annotations

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template

from e2ediff import __version__
from e2ediff.addresses import Address
from e2ediff.errors import PluginError

_CHECKS = {
    "average": "check_averaging",
    "time_sampler": "check_times",
    "feature": "check_features",
}
_KEYS = {
    "average": "target={}",
    "time_sampler": "times={}",
    "source": "data={}",
    "regularizer": "regularizers=[{}]",
    "diagnostic": "diagnostics=[{}]",
    "tracker": "trackers=[{}]",
    "feature": "objective.reconstruction.perceptual={}",
    "metric": "scores={{every: 8000, images: 256, features: random_projection, metrics: [{}]}}",
}


def template_kinds() -> list[str]:
    """Return the kinds of parts that have a template, as for `--kind`."""
    found = [file.name for file in (resources.files("e2ediff_testing") / "templates").iterdir()]
    kinds = {name.removesuffix(".py.txt") for name in found if name.endswith(".py.txt")}
    return sorted(kinds - {"test"})


def plugin_files(kind: str, name: str) -> dict[str, str]:
    """Return the text of every file of a plugin, by path.

    Args:
        kind: One of `template_kinds`.
        name: The part's name, such as `my_floor`.

    Raises:
        PluginError: The name is not snake_case.
    """
    part = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", part) or keyword.iskeyword(part):
        raise PluginError(f"{name!r}: the name must be snake_case, such as 'variance_floor'")
    words = {
        "part": part,
        "kind": kind.replace("_", " "),
        "Class": "".join(word.capitalize() for word in part.split("_")),
        "module": f"e2ediff_{part}",
        "distribution": f"e2ediff-{part.replace('_', '-')}",
        "check": _CHECKS.get(kind, f"check_{kind}"),
        "assignment": f"'{shown}'" if "[" in (shown := assignment(kind, part)) else shown,
        "range": version_range(),
    }
    templates = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{words['module']}.py": f"{kind}.py",
        f"tests/test_{part}.py": "test.py",
    }
    folder = resources.files("e2ediff_testing") / "templates"
    return {
        path: Template((folder / f"{file}.txt").read_text(encoding="utf-8")).substitute(words)
        for path, file in templates.items()
    }


def assignment(kind: str, part: str) -> str:
    """Return the `--set` assignment that puts a part of this kind into a recipe."""
    return _KEYS.get(kind, kind + "={}").format(part)


def version_range() -> str:
    """Return the versions of e2ediff that a plugin written now supports: `>=0.1,<0.2`."""
    major, minor = (int(n) for n in __version__.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}" if major == 0 else f">={major},<{major + 1}"


def write_plugin(kind: str, name: str, out: Address | None) -> Path:
    """Write a plugin's files into a new or empty folder, and return it.

    Raises:
        PluginError: The name is wrong, or the folder is not empty.
    """
    files = plugin_files(kind, name)
    folder = Path(out or f"e2ediff-{name.replace('_', '-')}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise PluginError(f"{folder}: is not empty; name another folder with --out")
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as exc:
        raise PluginError(f"{folder}: cannot be written ({exc})") from exc
    return folder
