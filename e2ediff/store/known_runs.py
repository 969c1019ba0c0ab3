"""Find runs by their name or address, and name them."""

from __future__ import annotations

import contextlib
import os
import re

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import RecipeError, RunDirectoryError
from e2ediff.host.yaml import parse_yaml
from e2ediff.limits import MAX_GRAPH
from e2ediff.store.attempts import ATTEMPTS, numbers
from e2ediff.store.run_directory import RESOLVED, RUN, RunDirectory, runs_folder
from e2ediff.store.storage import Store


def name_of_run(place: Address) -> str:
    """Return what a run's directory or URL is called: its last part.

    An attempt that a restart set aside is called NAME/attempts/N.
    """
    text = addresses.plain(place).rstrip("/")
    if os.path.basename(text) in ("", ".", ".."):
        text = os.path.abspath(text)
    parts = text.split("/")
    count = 3 if parts[-2:-1] == [ATTEMPTS] and parts[-1].isdecimal() else 1
    return "/".join(parts[-count:])


def own_recipe(place: Address) -> str:
    """Return the folder that holds the recipe of the run at this address, as text.

    That is the address itself, or one of its attempts where a restart was interrupted.

    Raises:
        RunDirectoryError: There is no run.
    """
    store = Store(place)
    folders = ["", *(f"{ATTEMPTS}/{number}" for number in reversed(numbers(store)))]
    for folder in folders:
        if store.exists(f"{folder}/{RESOLVED}".lstrip("/")):
            return store.where(folder)
    directory = RunDirectory.open(place)
    raise RunDirectoryError(f"{directory.store.where(RESOLVED)}: there is no such file.")


def folder_in(run: Address, folder: str, *inner: str) -> str:
    """Return the address of a run's folder in which a command writes results of its own.

    `inner` are folders in it, in which it writes too.

    Raises:
        RunDirectoryError: There is no run, or it is someone else's and one of these is a link.
    """
    directory, words = RunDirectory.open(run), folder.split("/")
    above = ["/".join(words[: i + 1]) for i in range(len(words))]
    directory.refuse_links(*above, *(f"{folder}/{name}" for name in inner))
    return directory.store.where(folder)


def latest_run(name: str) -> str | None:
    """Find the newest run of this name in $E2EDIFF_RUNS, or `runs`; None if there is none.

    A run killed before it began, or during a restart, counts.
    """
    runs = Store(runs_folder())
    pattern = re.compile(re.escape(name) + r"(?:-(\d{1,9}))?")
    numbered = [(pattern.fullmatch(found), found) for found in runs.list()]
    for _, found in sorted(((int(m[1] or 1), n) for m, n in numbered if m), reverse=True):
        path = runs.where(found)
        # The second run of `flow` and the first of a recipe called `flow-2` have the same path.
        if _is_run_of(path, name):
            return path
    return None


def _is_run_of(path: str, name: str) -> bool:
    """Return whether this is a run of this name, or may have been about to become one."""
    store = Store(path)
    if store.exists(RUN):
        # Don't fall back on an older run if this one is damaged: opening it reports that.
        with contextlib.suppress(RunDirectoryError):
            return RunDirectory.open(path).environment().get("name") == name
    elif not numbers(store) and not RunDirectory.never_began(path):
        return False
    try:
        recipe, _ = parse_yaml(store.read(RESOLVED, MAX_GRAPH).decode(), store.where(RESOLVED))
    except (OSError, UnicodeDecodeError, RecipeError):
        return True  # killed before the file was written, or after it was moved
    block = recipe.value if recipe else None
    return isinstance(block, dict) and "name" in block and block["name"].value == name
