"""Find what a user may have meant by a path at which nothing is."""

from __future__ import annotations

import os
from collections.abc import Iterable

from e2ediff.addresses import Address, plain
from e2ediff.host.registry import closest


def similar_paths(address: Address) -> list[str]:
    """Return up to three paths beside a missing local one whose names resemble it, best first."""
    path = plain(address)
    folder, name = os.path.split(path.rstrip("/"))
    if "::" in path or "://" in path or not name:
        return []
    entries = [entry for entry in _names(folder) if not entry.startswith(".")]
    return [os.path.join(folder, entry) for entry in closest(name, entries)]


def _names(folder: str) -> Iterable[str]:
    """Return the sorted names in a local folder; none if it cannot be read."""
    try:
        return sorted(os.listdir(folder or "."))
    except (OSError, ValueError):
        return []
