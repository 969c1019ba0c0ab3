"""Find what a user may have meant by a path at which nothing is."""

from __future__ import annotations

import os
from collections.abc import Iterable

from e2ediff.addresses import Address, plain
from e2ediff.host.registry import closest

_MOST = 3
_YAML = (".yaml", ".yml")


def similar_paths(address: Address) -> list[str]:
    """Return up to three paths beside a missing local one whose names resemble it, best first."""
    path = plain(address)
    folder, name = os.path.split(path.rstrip("/"))
    if "::" in path or "://" in path or not name:
        return []
    entries = [entry for entry in _names(folder) if not entry.startswith(".")]
    return [os.path.join(folder, entry) for entry in closest(name, entries)]


def similar_recipes(address: Address) -> list[str]:
    """Return up to three recipes that a missing path may have meant, best first.

    They are looked for in its folder, in the working directory, and in `recipes` and the folders
    in it: by the name without its suffix, as in `quickstart`, or by one that resembles it.
    """
    path = plain(address)
    if "://" in path:
        return []
    folder, name = os.path.split(path.rstrip("/"))
    wanted = _stem(name)
    inner = [os.path.join("recipes", entry) for entry in _names("recipes")]
    folders = dict.fromkeys([folder, "", "recipes", *filter(os.path.isdir, inner)])
    found: dict[str, list[str]] = {}
    for recipe in (recipe for place in folders for recipe in _recipes(place)):
        found.setdefault(_stem(os.path.basename(recipe)), []).append(recipe)
    stems = [wanted] if wanted in found else closest(wanted, found)
    stems = stems or [stem for stem in found if wanted and wanted in stem]
    return [recipe for stem in stems for recipe in found[stem]][:_MOST]


def recipes_in(folder: str) -> list[str]:
    """Return the first three recipes in a local folder."""
    return _recipes(folder)[:_MOST]


def _recipes(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in _names(folder) if name.endswith(_YAML)]


def _stem(name: str) -> str:
    root, suffix = os.path.splitext(name)
    return root if suffix in _YAML else name


def _names(folder: str) -> Iterable[str]:
    """Return the sorted names in a local folder; none if it cannot be read."""
    try:
        return sorted(os.listdir(folder or "."))
    except (OSError, ValueError):
        return []
