"""Put checkpoints that do not verify aside, so that they are neither used nor lost.

They keep their content as `checkpoints/.bad-<name>-<token>`, which is no name of a checkpoint.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator

from e2ediff.errors import CheckpointError
from e2ediff.store.checkpoint import list_checkpoints
from e2ediff.store.manifest import FOLDER, NewerFormatError, open_one
from e2ediff.store.storage import Store

_BAD = re.compile(r"\.bad-((?:abandoned-)?images-\d{12,18}(?:-r\d{1,6})?)-[0-9a-f]{8}")


def quarantined(store: Store) -> dict[str, str]:
    """Return the names that quarantined checkpoints had, by the names that they have now."""
    found = ((name, _BAD.fullmatch(name)) for name in store.list(FOLDER))
    return {name: match[1] for name, match in found if match}


def refuse_newer(store: Store, newest: str) -> None:
    """Refuse to go on from a checkpoint if a later one has a newer format: saves would replace it.

    Raises:
        CheckpointError: There is one.
    """
    names = list_checkpoints(store)
    for name in names[names.index(newest) + 1 :]:
        try:
            open_one(store, name, verify=False)
        except NewerFormatError as error:
            way_out = f"To go on from {newest} instead, move it to another place first."
            raise CheckpointError(f"{error} {way_out}") from error
        except CheckpointError:
            continue


def put_aside(
    store: Store, newest: str, warn: Callable[[str], None]
) -> Iterator[tuple[str, str, str]]:
    """Rename the checkpoints after the newest intact one that do not verify.

    Those that cannot be read are too, since the next save of as many images would replace them.
    Objects without a manifest stay in stores that are not local, where a save that was
    interrupted leaves them.

    Args:
        store: The run's, locked by this process.
        newest: The name of the newest intact checkpoint.
        warn: Called with a message for each that cannot be renamed.

    Yields:
        The name of each, why it does not verify, and the name under which it is kept.
    """
    names = list_checkpoints(store, finished=not store.local)
    for name in names[names.index(newest) + 1 :]:
        try:
            open_one(store, name, verify=True)
        except CheckpointError as error:
            kept = f".bad-{name}-{secrets.token_hex(4)}"
            if failed := store.rename_dir(f"{FOLDER}/{name}", f"{FOLDER}/{kept}"):
                warn(f"{store.where(f'{FOLDER}/{name}')}: cannot be put aside: {failed}")
            else:
                yield name, str(error), kept
