"""Keep what a restart or a rollback of a run replaces, as numbered attempts.

`attempts/<n>/` is laid out as the run's own directory, so that all commands read it as a run.
"""

from __future__ import annotations

import re

from e2ediff.store.manifest import FOLDER, NAME
from e2ediff.store.storage import Store

ATTEMPTS = "attempts"
PICTURE = re.compile(r"(?:reconstructions-)?step-(\d{1,12})\.png")
"""Names of the sheets in `samples/`."""


def numbers(store: Store) -> list[int]:
    """Return the numbers of the kept attempts, ascending."""
    found = [name for name in store.list(ATTEMPTS) if name.isdecimal()]
    return sorted(int(name) for name in found if store.list(f"{ATTEMPTS}/{name}"))


def next_place(store: Store) -> str:
    """Return the path of the next attempt: `attempts/3`."""
    return f"{ATTEMPTS}/{max(numbers(store), default=0) + 1}"


def later_files(store: Store, images: int, step: int) -> list[str]:
    """List pictures and snapshots made after this many training images, or steps."""
    found = []
    for name in store.list("samples"):
        if (match := PICTURE.fullmatch(name)) and int(match[1]) > step:
            found.append(f"samples/{name}")
    snapshots = f"post_hoc/{FOLDER}"
    for name in store.list(snapshots):
        if (match := NAME.fullmatch(name)) and int(match[1]) > images:
            found.append(f"{snapshots}/{name}")
    return found
