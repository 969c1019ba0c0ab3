"""Audit the checkpoints of a run: what there is, what verifies, and what may be deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import attrs

from e2ediff.errors import CheckpointError
from e2ediff.store.checkpoint import checkpoint_at, discard, list_checkpoints
from e2ediff.store.manifest import FOLDER, NAME, Checkpoint, NewerFormatError, open_one
from e2ediff.store.quarantine import quarantined
from e2ediff.store.records import images_of, newest_saved
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store

State = Literal["intact", "damaged", "newer format", "quarantined", "abandoned", "missing"]


@attrs.frozen(kw_only=True)
class Listed:
    """A checkpoint as it lies in a run, whether or not it can be opened.

    `reason` is what is wrong with it, "" if nothing; `images`, `step`, `created` and `format` are
    None where it cannot be opened.
    `resumed` is whether a run would go on from it.
    """

    name: str
    state: State
    reason: str
    bytes: int
    images: int | None
    step: int | None
    created: str | None
    format: int | None
    resumed: bool = False


def survey(store: Store, *, verify: bool) -> list[Listed]:
    """Describe all checkpoints in a store, oldest first, then abandoned and quarantined ones.

    Args:
        store: A run's store, or that of its snapshots.
        verify: Whether to hash every file; otherwise names and sizes of files are checked.

    Raises:
        CheckpointError: The directory cannot be read.
    """
    names = list_checkpoints(store)
    found = [_listed(store, name, verify=verify) for name in names]
    readable = [i for i, one in enumerate(found) if one.state in ("intact", "newer format")]
    newest = readable[-1] if readable else -1
    if newest >= 0 and found[newest].state == "intact":  # else a run refuses to go on
        found[newest] = attrs.evolve(found[newest], resumed=True)
    for name in _abandoned(store):
        one = _listed(store, name, verify=verify)
        found.append(attrs.evolve(one, state="abandoned") if one.state == "intact" else one)
    for kept in quarantined(store):
        one = _listed(store, kept, verify=False)
        found.append(attrs.evolve(one, state="quarantined"))
    return found


def missing(directory: RunDirectory) -> list[Listed]:
    """Describe the newest checkpoint that a run recorded, if neither it nor a later one is there.

    Raises:
        CheckpointError: The directory cannot be read.
    """
    store, name = directory.store, newest_saved(directory)
    there = [*list_checkpoints(store), *quarantined(store).values()]
    if images_of(name) <= max(map(images_of, there), default=-1):
        return []
    reason = (
        f"{store.where(f'{FOLDER}/{name}')}: is not there, though the records of the run say that "
        "it was saved. Restore it from a copy (is a disk not mounted?)."
    )
    return [
        Listed(
            name=name, state="missing", reason=reason, bytes=0, images=None, step=None,
            created=None, format=None,
        )
    ]  # fmt: skip


def prune(
    store: Store, keep: int | None, *, bad: bool, dry_run: bool, warn: Callable[[str], None]
) -> Iterator[tuple[str, int]]:
    """Delete old checkpoints of a run that this process has locked.

    The `keep` newest intact ones stay, also the one to which the newest would roll back, and
    everything later.

    Args:
        store: The run's.
        keep: How many stay, at least 1; None deletes none of them.
        bad: Whether to delete quarantined ones.
        dry_run: Whether to delete nothing, and only report.
        warn: Called with a message for each that cannot be deleted.

    Yields:
        Name and bytes of each that was deleted.

    Raises:
        CheckpointError: None is intact, so that none may be deleted.
    """
    gone = [*quarantined(store)] if bad else []
    if keep is not None:
        gone = [*_old(store, keep), *gone]
    for name in gone:
        size = _size(store, name)
        if not dry_run:
            discard(store, name, warn)
        if dry_run or not store.exists(f"{FOLDER}/{name}"):
            yield name, size


def _old(store: Store, keep: int) -> list[str]:
    """List the checkpoints before the `keep` newest intact ones, but for that of a rollback."""
    names, kept = list_checkpoints(store), list[Checkpoint]()
    for name in reversed(names):
        if len(kept) < keep:
            try:
                kept.append(open_one(store, name, verify=True))
            except CheckpointError:
                continue
    if names and not kept:
        raise CheckpointError(
            f"{store.where(FOLDER)}: no checkpoint is intact, so none is deleted. "
            "`e2ediff ckpt verify` says why."
        )
    if not kept:
        return []
    alarm = kept[0].state.get("alarm", {})
    anchor = alarm.get("anchor") if isinstance(alarm, dict) else None
    spared = checkpoint_at(store, anchor) if type(anchor) is int else ""
    return [name for name in names[: names.index(kept[-1].name)] if name != spared]


def _abandoned(store: Store) -> Sequence[str]:
    """Return the names of checkpoints of a future from which the run was rolled back."""
    return [n for n in store.list(FOLDER) if NAME.fullmatch(n) and n.startswith("abandoned-")]


def _listed(store: Store, name: str, *, verify: bool) -> Listed:
    size, state, reason, found = _size(store, name), "intact", "", None
    try:
        found = open_one(store, name, verify)
    except CheckpointError as error:
        state = "newer format" if isinstance(error, NewerFormatError) else "damaged"
        reason = str(error)
    return Listed(
        name=name,
        state=state,  # type: ignore[arg-type]
        reason=reason,
        bytes=size,
        images=found.images if found else None,
        step=found.step if found else None,
        created=found.about.created if found else None,
        format=found.about.version if found else None,
    )


def _size(store: Store, name: str) -> int:
    total = 0
    for file in store.list(f"{FOLDER}/{name}"):
        try:
            total += store.size(f"{FOLDER}/{name}/{file}")
        except OSError:  # a link to nothing, or a pipe
            continue
    return total
