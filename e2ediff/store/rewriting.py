"""Write checkpoints of an earlier format anew in the present one.

They are read without that: `e2ediff.store.migration` converts them each time they are opened.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping

from safetensors.torch import save as encode

from e2ediff.store.checkpoint import discard
from e2ediff.store.manifest import (
    FOLDER,
    MANIFEST,
    STATE,
    Checkpoint,
    json_bytes,
    open_one,
    plain,
    sealed,
)
from e2ediff.store.migration import FORMAT_VERSION, STEPS, Step
from e2ediff.store.storage import JSON, Store


def rewrite(
    store: Store,
    name: str,
    warn: Callable[[str], None],
    steps: Mapping[int, Step] = STEPS,
    to: int = FORMAT_VERSION,
) -> int:
    """Write a checkpoint anew if its format is earlier; return the format that it had.

    At any moment the old one or the new one is whole under a name of this number of images; the
    old one is deleted once the new one verifies.

    Args:
        store: The run's, locked by this process.
        name: The checkpoint.
        warn: Called with a message if the old one cannot be deleted.
        steps: By format, what converts it to the next one.
        to: The format to write.

    Raises:
        CheckpointError: It does not verify, before or after.
        ResourceError: The disk or store refused; the old one is intact.
    """
    found = open_one(store, name, verify=True, steps=steps, to=to)
    if found.about.version == to:
        return to
    base, present = name.partition("-r")[0], store.list(FOLDER)
    final = next(free for i in range(1, 10**6) if (free := f"{base}-r{i}") not in present)
    hidden = f".tmp-{name}-{secrets.token_hex(4)}" if store.local else final
    written: dict[str, JSON] = {}

    def put(file: str, data: bytes) -> None:
        store.write(f"{FOLDER}/{hidden}/{file}", data)
        written[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    try:
        aliases: dict[str, JSON] = {}
        for file in found.files:
            stored, shared = found.stored(file)
            put(f"{file}.safetensors", encode(stored))
            aliases |= {file: shared} if shared else {}
        put(STATE, json_bytes(plain(found.state, STATE)))
        store.write(f"{FOLDER}/{hidden}/{MANIFEST}", sealed(_body(found, aliases, written, to)))
        if hidden != final and (failed := store.rename_dir(*_paths(hidden, final))):
            raise store.refusal(f"{FOLDER}/{final}", 0, failed)
        open_one(store, final, verify=True, steps=steps, to=to)
    except BaseException:
        store.remove_dir(f"{FOLDER}/{hidden}")
        store.remove_dir(f"{FOLDER}/{final}")
        raise
    discard(store, name, warn)
    if store.local:
        store.rename_dir(*_paths(final, name))
    return found.about.version


def _paths(*names: str) -> tuple[str, ...]:
    return tuple(f"{FOLDER}/{name}" for name in names)


def _body(
    found: Checkpoint, aliases: Mapping[str, JSON], files: Mapping[str, JSON], to: int
) -> dict[str, JSON]:
    about = found.about
    return {
        "format_version": to,
        "images": found.images,
        "step": found.step,
        "aliases": aliases,
        "created": about.created,
        "parent": about.parent,
        "latent": plain(found.latents, "latent"),
        "environment": plain(about.environment, "environment"),
        "migrated_from": about.version,
        "files": files,
    }
