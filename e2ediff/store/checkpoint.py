"""Write and open checkpoints, which are whole or absent, and used only if their hashes agree.

A checkpoint is a directory `checkpoints/images-000000256000/`: one safetensors file for each
group of tensors, `state.json` for everything else, and `MANIFEST.json`, which lists the
others with sizes and SHA-256 and is written last. Locally all of it is written under another
name and renamed; on other stores the manifest is the commit mark. Nothing is ever pickled.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime

import safetensors
import torch
from torch import Tensor

from e2ediff import terminal
from e2ediff.errors import CheckpointError, DivergedError, E2EDiffError
from e2ediff.store.environment import versions
from e2ediff.store.manifest import (
    FOLDER,
    MANIFEST,
    NAME,
    STATE,
    Checkpoint,
    is_sound,
    json_bytes,
    open_one,
    plain,
    sealed,
)
from e2ediff.store.migration import FORMAT_VERSION
from e2ediff.store.storage import JSON, Store
from e2ediff.store.tensor_file import count_not_finite, pieces, size_of

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def save(
    store: Store,
    images: int,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    keep: int,
    warn: Callable[[str], None] = terminal.warn,
    spare: int | None = None,
    pulse: Callable[[], None] = lambda: None,
) -> str:
    """Write a checkpoint, make it durable, then delete old ones; return its name.

    A checkpoint of the same number of images is replaced; some checkpoint is valid at any time.
    Checkpoints of *more* images belong to a future that was rolled back: they are renamed to
    `abandoned-...` and left alone. The `keep` newest ones stay (0: all), and the one of `spare`
    images. Trouble with old checkpoints is reported to `warn` and never stops training.
    `pulse` is called between pieces of some megabytes; what it raises ends the save, of which
    nothing stays then.
    Besides the tensors little memory is needed, except on stores that are not local: those get
    each file whole.

    Raises:
        CheckpointError: something is neither a tensor nor JSON. Nothing was written.
        DivergedError: a tensor holds nan or inf. Nothing was written.
        ResourceError: the disk or store refused. The older checkpoints are intact.
    """
    name = checkpoint_name(images)
    rest = dict(state)
    latent = plain(rest.pop("latent", {}), f"{STATE}.latent")
    text = json_bytes(plain(rest, STATE))
    unique, aliases = {}, {}
    for file, tensors in files.items():
        if not _FILE.fullmatch(file) or f"{file}.safetensors" == STATE:
            raise CheckpointError(f"{name}: {file!r} cannot be the name of a checkpoint file.")
        unique[file], aliases[file] = _deduplicated(file, tensors)
    needed = len(text) + sum(map(size_of, unique.values()))
    try:
        final, parent = _prepare(store, name, needed, warn)
        body: dict[str, JSON] = {
            "format_version": FORMAT_VERSION,
            "images": images,
            "step": step,
            "aliases": {file: found for file, found in aliases.items() if found},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "parent": parent,
            "latent": latent,
            "environment": versions(),
        }
        hidden = f".tmp-{name}-{secrets.token_hex(4)}"
        folder = f"{FOLDER}/{hidden if store.local else final}"
        try:
            _write(store, folder, final, unique, text, body, pulse)
        except BaseException:
            store.remove_dir(folder)
            raise
    except OSError as error:
        raise store.refusal(f"{FOLDER}/{name}", needed, error) from error
    try:
        final = _supersede(store, final, name, warn)
        _retire(store, final, keep, warn, spare)
    except (OSError, E2EDiffError) as error:
        warn(f"old checkpoints could not be deleted: {error}")
    return final


def list_checkpoints(store: Store, *, finished: bool = False) -> list[str]:
    """Return the names of a run's checkpoints, oldest first, including damaged ones.

    With `finished` only those that have a manifest, without which a save never finished.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        found = [(NAME.fullmatch(name), name) for name in store.list(FOLDER)]
        known = [(int(m[1]), int(m[2] or 0), n) for m, n in found if m and n.startswith("images-")]
        names = [name for _, _, name in sorted(known)]
        return [n for n in names if not finished or store.exists(f"{FOLDER}/{n}/{MANIFEST}")]
    except OSError as error:
        raise CheckpointError(f"{store.where(FOLDER)}: cannot be read: {error}") from error


def checkpoint_name(images: int) -> str:
    """Return the name of the first checkpoint after this many training images."""
    return f"images-{images:012d}"


def checkpoint_at(store: Store, images: int) -> str:
    """Return the name of the checkpoint after this many training images, even if there is none."""
    name = checkpoint_name(images)
    finished = list_checkpoints(store, finished=True)
    saved = [found for found in finished if found.partition("-r")[0] == name]
    return saved[-1] if saved else name


def open_checkpoint(
    store: Store,
    name: str | None = None,
    verify: bool = True,
    warn: Callable[[str], None] = terminal.warn,
    use: str = "use --checkpoint {}",
) -> Checkpoint:
    """Open one checkpoint by name, or the newest that verifies.

    `verify` hashes every file now; without it the set of files and their sizes are checked now,
    and each file's hash when `tensors` reads it.
    `use` is the advice in the error for another one that verifies, with `{}` for its name.

    Raises:
        CheckpointError: the named one is missing, damaged or of a newer format, or there is
            none that verifies. Skipped damaged ones are reported to `warn`.
    """
    if name is not None:
        try:
            return open_one(store, name, verify)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {_way_out(store, name, use)}") from error
    problems: list[str] = []
    told: set[str] = set()
    while True:
        # A run that goes on may have replaced all that were listed: then there is something new.
        before, problems = problems, []
        finished = list_checkpoints(store, finished=True)
        for candidate in reversed(list_checkpoints(store)):
            try:
                return open_one(store, candidate, verify)
            except CheckpointError as error:
                if str(error) not in told:
                    warn(f"skipped {error}")
                told.add(str(error))
                if candidate in finished:
                    problems.append(str(error))
        if problems == before:
            break
    if not problems:
        raise CheckpointError(f"{store.where(FOLDER)}: there is no checkpoint yet.")
    raise CheckpointError(
        "\n  ".join([f"{store.where(FOLDER)}: no checkpoint is intact.", *problems])
    )


def drop_after(store: Store, images: int, warn: Callable[[str], None] = terminal.warn) -> None:
    """Delete the checkpoints made after this many training images."""
    for name in list_checkpoints(store):
        if int(name.split("-")[1]) > images:
            discard(store, name, warn)


def _way_out(store: Store, name: str, use: str) -> str:
    names = [n for n in list_checkpoints(store, finished=True) if n != name]
    older = [n for n in reversed(names) if n < name]
    for candidate in [*older, *(n for n in reversed(names) if n > name)]:
        if is_sound(store, candidate, verify=True):
            return f"{candidate} is intact: {use.format(candidate)}."
    return "No other checkpoint of this run is intact."


def _deduplicated(
    file: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store, and the stored name of each alias of another tensor."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            kind = type(tensor).__name__
            raise CheckpointError(f"{file}: {name}: only dense tensors are saved, not {kind}.")
        # Views of the same memory that differ in shape are stored separately: values are kept.
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            stored[name] = tensor
    for name, bad in count_not_finite(stored).items():
        raise DivergedError(
            f"{file}: {name} holds nan or inf ({bad:,} of {stored[name].numel():,} values); "
            "this checkpoint was not written, the older ones are intact."
        )
    return stored, aliases


def _prepare(
    store: Store, name: str, needed: int, warn: Callable[[str], None]
) -> tuple[str, str | None]:
    """Remove what crashes left, and check the space; return a free name, and the parent's."""
    for found in store.list(FOLDER):
        if found.startswith((".tmp-", ".trash-")):
            _report(store.remove_dir(f"{FOLDER}/{found}"), store, found, warn)
    free = store.free_bytes()
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    names = list_checkpoints(store)
    older = [found for found in list_checkpoints(store, finished=True) if found < name]
    revisions = []
    for found in names:
        if found == name or found.startswith(f"{name}-r"):
            if store.exists(f"{FOLDER}/{found}/{MANIFEST}"):
                revisions.append(int(found.partition("-r")[2] or 0))
            else:
                discard(store, found, warn)
    final = f"{name}-r{max(revisions) + 1}" if revisions else name
    return final, older[-1] if older else None


def _write(
    store: Store,
    folder: str,
    name: str,
    files: Mapping[str, Mapping[str, Tensor]],
    state: bytes,
    body: Mapping[str, JSON],
    pulse: Callable[[], None],
) -> None:
    """Write the files into a folder, the manifest last, and rename it."""
    written: dict[str, JSON] = {}

    def put(file: str, content: Iterable[bytes | memoryview], needed: int) -> None:
        digest, size = hashlib.sha256(), 0

        def hashed() -> Iterator[bytes | memoryview]:
            nonlocal size
            for piece in content:
                pulse()
                digest.update(piece)
                size += len(piece)
                yield piece

        store.write(f"{folder}/{file}", hashed(), needed)
        written[file] = {"bytes": size, "sha256": digest.hexdigest()}

    for file, tensors in files.items():
        try:
            put(f"{file}.safetensors", pieces(tensors), size_of(tensors))
        except (safetensors.SafetensorError, RuntimeError, ValueError, LookupError) as error:
            raise CheckpointError(f"{file}: cannot be saved: {error}") from error
    put(STATE, [state], len(state))
    pulse()
    store.write(f"{folder}/{MANIFEST}", sealed({**body, "files": written}))
    if folder != f"{FOLDER}/{name}":
        failed = store.rename_dir(folder, f"{FOLDER}/{name}")
        if failed:
            raise failed


def _supersede(store: Store, saved: str, name: str, warn: Callable[[str], None]) -> str:
    """Delete earlier saves of the same number of images, then give the new one the plain name."""
    if saved == name:
        return name
    for found in list_checkpoints(store):
        if found != saved and (found == name or found.startswith(f"{name}-r")):
            discard(store, found, warn)
    if not store.local or store.rename_dir(f"{FOLDER}/{saved}", f"{FOLDER}/{name}"):
        return saved
    return name


def _retire(
    store: Store, saved: str, keep: int, warn: Callable[[str], None], spare: int | None
) -> None:
    names = list_checkpoints(store)
    if saved not in names:  # some stores list a new object late: old ones wait for the next save
        return
    for later in names[names.index(saved) + 1 :]:
        taken = store.list(FOLDER)
        number = next(i for i in range(1, 10**6) if _abandoned(later, i) not in taken)
        target = f"{FOLDER}/{_abandoned(later, number)}"
        _report(store.rename_dir(f"{FOLDER}/{later}", target), store, later, warn)
    names = names[: names.index(saved) + 1]
    if keep <= 0 or len(names) <= keep:
        return
    sound = [name for name in names if is_sound(store, name, verify=False)]
    kept = sound[-keep:]
    # Sizes do not prove content: verify the one that is kept before deleting others.
    if not any(is_sound(store, name, verify=True) for name in reversed(kept)):
        warn(f"{store.where(FOLDER)}: none of {', '.join(kept)} is intact; old ones are kept.")
        return
    spared = None if spare is None else checkpoint_at(store, spare)
    for name in names[: names.index(kept[0])]:
        if name != spared:
            discard(store, name, warn)


def _abandoned(name: str, number: int) -> str:
    plain = name.partition("-r")[0]
    return f"abandoned-{plain}" + (f"-r{number}" if number > 1 else "")


def discard(store: Store, name: str, warn: Callable[[str], None]) -> None:
    """Delete a checkpoint so that no remains after a crash look like a checkpoint."""
    path = f"{FOLDER}/{name}"
    if store.local:
        trash = f"{FOLDER}/.trash-{name}-{secrets.token_hex(4)}"
        error, path = store.rename_dir(path, trash), trash
    else:
        error = store.remove_file(f"{path}/{MANIFEST}")
    _report(error or store.remove_dir(path), store, name, warn)


def _report(error: OSError | None, store: Store, name: str, warn: Callable[[str], None]) -> None:
    if error:
        warn(f"{store.where(f'{FOLDER}/{name}')}: could not be moved or removed: {error}")
