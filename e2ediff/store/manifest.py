"""Read a checkpoint: its manifest, and files verified against it.

Nothing is parsed before its hash is verified, and the bytes parsed are the bytes hashed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import attrs
import safetensors
import torch
from safetensors.torch import load as decode
from torch import Tensor

from e2ediff.errors import CheckpointError
from e2ediff.latent import LatentContract
from e2ediff.store.migration import FORMAT_VERSION, Body, migrate
from e2ediff.store.storage import JSON, Store

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
STATE = "state.json"

LIMIT = 1 << 24
"""Bytes of JSON that are written or read at all."""

_READS = 3  # of a file from a store, which may return other bytes once than it holds

NAME = re.compile(r"(?:abandoned-)?images-(\d{12,18})(?:-r(\d{1,6}))?")
"""Names of checkpoints: the number of images, and the save of that number if not the first."""


@attrs.frozen
class Checkpoint:
    """An opened checkpoint: counters and state are loaded, tensors are read on demand."""

    name: str
    path: str
    images: int
    step: int
    state: dict[str, Any]
    files: tuple[str, ...]
    _store: Store = attrs.field(repr=False)
    _manifest: Manifest = attrs.field(repr=False)
    _body: Body = attrs.field(repr=False)

    def latent(self, file: str) -> LatentContract | None:
        """Return the latent contract of these weights; `None` if it was not saved.

        Raises:
            CheckpointError: The saved contract cannot be read.
        """
        body = self._body.latent.get(file)
        if body is None:
            return None
        try:
            return LatentContract.read(body)
        except (LookupError, TypeError, ValueError) as error:
            what = f"{MANIFEST}: the latents of {file!r} are not described ({error!r})"
            raise _damaged(self._store, self.name, what) from error

    def tensors(self, file: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read the tensors of one file; names that shared memory when saved share it again.

        Raises:
            CheckpointError: The checkpoint has no such file, or its content is damaged.
        """
        if file not in self.files:
            raise CheckpointError(
                f"{self.path}: has no {file!r}; it has {', '.join(map(repr, self.files))}."
            )
        data = _content(self._store, self.name, self._manifest, f"{file}.safetensors")
        try:
            tensors = {name: t.to(device) for name, t in decode(data).items()}
            for alias, name in self._manifest.aliases.get(file, {}).items():
                tensors[alias] = tensors[name]
        except (safetensors.SafetensorError, ValueError, TypeError, LookupError) as error:
            raise _damaged(self._store, self.name, f"{file}.safetensors: {error}") from error
        renamed = self._body.names.get(file, {})
        return {renamed.get(name, name): tensor for name, tensor in tensors.items()}

    def sha256(self, file: str) -> str:
        """Return the hash of one file's content, which `tensors` verifies."""
        return self._manifest.files[f"{file}.safetensors"][1]


@attrs.frozen
class Manifest:
    """Content of `MANIFEST.json`: counters, files, names that share a stored tensor, latents."""

    version: int
    images: int
    step: int
    files: dict[str, tuple[int, str]]  # bytes and hash by file name
    aliases: dict[str, dict[str, str]]
    latent: dict[str, dict[str, Any]] = attrs.field(factory=dict)  # contract by file


def open_one(store: Store, name: str, verify: bool) -> Checkpoint:
    """Open a checkpoint; `verify` hashes every file of it now.

    Raises:
        CheckpointError: It is missing, damaged or of a newer format.
    """
    manifest = _read_manifest(store, name)
    for file in manifest.files:
        if verify and file != STATE:
            _content(store, name, manifest, file, keep=False)
    try:
        state = json.loads(_content(store, name, manifest, STATE))
    except (ValueError, RecursionError) as error:
        raise _damaged(store, name, f"{STATE}: {error}") from error
    if not isinstance(state, dict):
        raise _damaged(store, name, f"{STATE} holds no object")
    try:
        body = migrate(Body(state, manifest.latent), manifest.version)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"it cannot be read as format {manifest.version} ({error!r})"
        raise _damaged(store, name, what) from error
    files = tuple(f.removesuffix(".safetensors") for f in manifest.files if f != STATE)
    where = store.where(f"{FOLDER}/{name}")
    return Checkpoint(
        name, where, manifest.images, manifest.step, dict(body.state), files, store, manifest, body
    )


def is_sound(store: Store, name: str, verify: bool) -> bool:
    """Return whether `open_one` succeeds."""
    try:
        open_one(store, name, verify)
    except CheckpointError:
        return False
    return True


def sealed(body: Mapping[str, JSON]) -> bytes:
    """Return the manifest's text, with the hash of all other entries as its last entry."""
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": seal}, indent=1).encode() + b"\n"


def plain(value: object, where: str) -> JSON:
    """Return the value if JSON preserves it; json.dumps would silently turn keys into text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    raise CheckpointError(
        f"{where}: a {type(value).__name__} cannot be saved as JSON; "
        "save tensors in a tensor file, the rest as numbers, text, lists and string-keyed dicts."
    )


def json_bytes(value: JSON) -> bytes:
    """Return the text of `state.json`.

    Raises:
        CheckpointError: It would be too long to be read.
    """
    data = json.dumps(value, indent=1).encode() + b"\n"
    if len(data) > LIMIT:
        raise CheckpointError(f"{STATE}: {len(data):,} bytes is over the limit of {LIMIT:,}.")
    return data


def _read_manifest(store: Store, name: str) -> Manifest:
    """Read the manifest, after checking its hash, the set of files and their sizes."""
    try:
        plain = name not in {"", ".", ".."} and not re.search(r"[/\\\0]", name)
        present = set(store.list(f"{FOLDER}/{name}")) if plain else set()
        if not present:
            raise CheckpointError(f"{store.where(f'{FOLDER}/{name}')}: no such checkpoint.")
        if MANIFEST not in present:
            raise _damaged(store, name, f"{MANIFEST} is missing, so its save never finished")
        raw = store.read(f"{FOLDER}/{name}/{MANIFEST}", LIMIT)
        manifest = _parse_manifest(store, name, raw)
        listed = {MANIFEST, *manifest.files}
        if missing := sorted(listed - present):
            raise _damaged(store, name, f"missing: {', '.join(missing)}")
        if extra := sorted(present - listed):
            raise _damaged(store, name, f"files that do not belong to it: {', '.join(extra)}")
        for file, (expected, _) in manifest.files.items():
            if file == STATE and expected > LIMIT:
                raise _damaged(store, name, f"{file} is over the limit of {LIMIT:,} bytes")
            if (size := store.size(f"{FOLDER}/{name}/{file}")) != expected:
                raise _damaged(
                    store, name, f"{file} has {size:,} bytes, it was written with {expected:,}"
                )
    except OSError as error:
        raise _damaged(store, name, f"cannot be read: {error}") from error
    return manifest


def _parse_manifest(store: Store, name: str, raw: bytes) -> Manifest:
    try:
        body = json.loads(raw)
        version = body["format_version"]
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"format_version is {version!r}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{store.where(f'{FOLDER}/{name}')}: was written by a newer e2ediff (checkpoint "
                f"format {version}, this one reads {FORMAT_VERSION}). Upgrade e2ediff."
            )
        del body["sha256"]
        # Compare the text, not only the hash, so that nothing in the file is left unchecked.
        if sealed(body) != raw:
            raise _damaged(store, name, f"{MANIFEST} does not match its own hash")
        files = {str(f): (int(e["bytes"]), str(e["sha256"])) for f, e in body["files"].items()}
        aliases = {str(file): dict(names) for file, names in body["aliases"].items()}
        latent = {str(file): dict(found) for file, found in body.get("latent", {}).items()}
        counts = (int(body["images"]), int(body["step"]))
        manifest = Manifest(version, *counts, files, aliases, latent)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise _damaged(store, name, f"{MANIFEST} is unreadable ({error})") from error
    match = NAME.fullmatch(name)
    if match and int(match[1]) != manifest.images:
        raise _damaged(store, name, f"its {MANIFEST} is of {manifest.images} images")
    return manifest


def _content(store: Store, name: str, manifest: Manifest, file: str, keep: bool = True) -> bytes:
    """Read and verify a file; return its bytes if `keep`, the same ones that were hashed."""
    if file not in manifest.files:
        raise _damaged(store, name, f"missing: {file}")
    wanted = manifest.files[file][1]
    for _ in range(1 if store.local else _READS):
        digest, pieces = hashlib.sha256(), []
        try:
            for piece in store.chunks(f"{FOLDER}/{name}/{file}"):
                digest.update(piece)
                if keep:
                    pieces.append(piece)
        except OSError as error:
            raise _damaged(store, name, f"{file} cannot be read: {error}") from error
        if digest.hexdigest() == wanted:
            return b"".join(pieces)
    raise _damaged(store, name, f"{file} does not match its hash in {MANIFEST}")


def _damaged(store: Store, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{store.where(f'{FOLDER}/{name}')}: the checkpoint is damaged: {what}."
    )
