"""Find out from a run's records what was saved, when its checkpoints are gone.

Damaged lines are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from e2ediff.errors import CheckpointError
from e2ediff.host.recipe import Recipe
from e2ediff.store.attempts import ATTEMPTS, later_files
from e2ediff.store.manifest import FOLDER, NAME
from e2ediff.store.quarantine import quarantined
from e2ediff.store.run_directory import EVENTS, METRICS, STATUS, RunDirectory
from e2ediff.store.storage import JSON

STAGED, COMMITTED = "staged", "committed"
"""The events of a checkpoint that was copied, to be written beside training, and is complete."""

SAVES = (COMMITTED, "saved")
"""Kinds of that event: it was `saved` in runs from before saves left the training thread."""


def newest_saved(directory: RunDirectory) -> str:
    """Return the name of the newest checkpoint that a run had, taking rollbacks into account.

    "" if no record shows that there was one.
    """
    name = ""
    for event in directory.store.json_lines(EVENTS):
        if event.get("kind") in SAVES:
            name = str(event.get("name", ""))
        elif event.get("kind") in ("rewound", "lost"):
            name = str(event.get("to", ""))
    return name or str(directory.former_status().get("last_checkpoint") or "")


def images_of(name: str) -> int:
    """Return the number of training images in a checkpoint's name; -1 for other names."""
    match = NAME.fullmatch(name)
    return int(match[1]) if match else -1


def refuse_vanished(directory: RunDirectory, recipe: Recipe, changes: Mapping[str, JSON]) -> None:
    """Refuse to start a run from the beginning if its checkpoints are lost.

    Args:
        directory: The run's directory, without checkpoints.
        recipe: The recipe of the continuation.
        changes: Differences to the run's recipe, as `refuse_other_recipe` returns them.

    Raises:
        CheckpointError: Its events, status, figures, pictures or snapshots show that it had
            a checkpoint.
    """
    events = list(directory.store.json_lines(EVENTS))
    due = max(_cadences([changes, *(e.get("changes") for e in events)], recipe))
    steps = chain([directory.former_status()], directory.store.json_lines(METRICS))
    step = max((s for line in steps if isinstance(s := line.get("step"), int)), default=0)
    # The first save may have waited for a good step, and is complete when the second one begins.
    # Without any event it cannot be told whether one was complete.
    limit = 2 * due if events or not directory.store.local else due
    later = later_files(directory.store, limit * recipe.batch, limit)
    if bad := sorted(quarantined(directory.store)):
        why = f"{bad[-1]} was one, and did not verify"
    elif name := newest_saved(directory):
        saved = any(e.get("kind") in (*SAVES, "rewound", "lost") for e in events)
        why = f"{EVENTS if saved else STATUS} says that {name} was saved"
    elif step > limit or later:
        seen = f"the run was at step {step}" if step > limit else f"{later[-1]} exists"
        why = f"{seen}, and a checkpoint was due at step {due}"
    else:
        return
    raise CheckpointError(
        f"{directory.store.where(FOLDER)}: there is no finished checkpoint, but {why}. "
        "Restore it (is a disk not mounted?), or start again with --restart, which keeps what is "
        f"left of this attempt in {ATTEMPTS}/."
    )


def _cadences(changes: Iterable[object], recipe: Recipe) -> Iterator[int]:
    """Yield the steps between checkpoints, of this recipe and of earlier ones of the run."""
    yield recipe.cadence.checkpoint
    for change in changes:
        if isinstance(change, Mapping):
            values = change.get("cadence.checkpoint")
            for text in values if isinstance(values, list) else ():
                if str(text).isdecimal():
                    yield int(text)
