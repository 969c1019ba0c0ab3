"""Read a checkpoint: its manifest, and files verified against it.

Nothing is parsed before its hash is verified, and the bytes parsed are the bytes hashed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
import safetensors
import torch
from safetensors.torch import load as decode
from torch import Tensor

from e2ediff.errors import CheckpointError, DivergedError
from e2ediff.latent import LatentContract
from e2ediff.store.migration import FORMAT_VERSION, STEPS, Body, Step, migrate
from e2ediff.store.storage import JSON, Store

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
STATE = "state.json"

LIMIT = 1 << 24
"""Bytes of JSON that are written or read at all."""

_READS = 3  # of a file from a store, which may return other bytes once than it holds

NAME = re.compile(r"(?:abandoned-)?images-(\d{12,18})(?:-r(\d{1,6}))?")
"""Names of checkpoints: the number of images, and the save of that number if not the first."""

MOST = 10**18
"""No count of a checkpoint is as large: those of its name have 18 digits at most."""

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


class NewerFormatError(CheckpointError):
    """A checkpoint was written in a format that only a later version of e2ediff reads."""


def count(value: object, what: str, most: int = MOST) -> int:
    """Return a whole number from 0 to `most`, read from a file.

    Raises:
        ValueError: It is anything else, also True or 3.0.
    """
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{what} is {_short(value)}, expected a whole number from 0 to {most:,}")
    return value


def block(value: object, kind: type[T], what: str) -> T:
    """Return a value read from a file, if it is of this kind.

    Raises:
        TypeError: It is of another one.
    """
    if type(value) is not kind:
        raise TypeError(f"{what} is {_short(value)}, expected {_KINDS[kind]}")
    return value


_KINDS: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
}


def _short(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:37]}..."


def finite_json(text: bytes | str) -> Any:
    """Parse JSON whose numbers are finite.

    Raises:
        ValueError: It is no JSON, or has NaN, Infinity, or a number too large for a float.
        RecursionError: It is nested too deep.
    """
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


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
        except _UNREADABLE as error:
            what = f"{MANIFEST}: the latents of {file!r} are not described ({error!r})"
            raise _damaged(self._store, self.name, what) from error

    @property
    def about(self) -> About:
        """What the manifest says of its origin."""
        return self._manifest.about

    @property
    def latents(self) -> Mapping[str, Mapping[str, Any]]:
        """The latent contracts by set of weights, as JSON."""
        return self._body.latent

    def stored(self, file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Read the tensors of one file that are stored, and the stored name of each other one.

        Raises:
            CheckpointError: As `tensors`.
        """
        tensors, renamed = self.tensors(file), self._body.names.get(file, {})
        shared = {
            renamed.get(alias, alias): renamed.get(name, name)
            for alias, name in self._manifest.aliases.get(file, {}).items()
        }
        return {name: t for name, t in tensors.items() if name not in shared}, shared

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
        except (safetensors.SafetensorError, *_UNREADABLE, RuntimeError) as error:
            raise _damaged(self._store, self.name, f"{file}.safetensors: {error}") from error
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                what = f"{file}.safetensors: {name} holds nan or inf"
                raise _damaged(self._store, self.name, what)
        renamed = self._body.names.get(file, {})
        return {renamed.get(name, name): tensor for name, tensor in tensors.items()}

    def sha256(self, file: str) -> str:
        """Return the hash of one file's content, which `tensors` verifies."""
        return self._manifest.files[f"{file}.safetensors"][1]

    def read(self, name: str, reader: Callable[[Any], T]) -> T:
        """Pass a block of the state to its reader; an empty one if it was not saved.

        Raises:
            CheckpointError: The reader refuses it, by a ValueError for example.
        """
        try:
            return reader(self.state.get(name, {}))
        except _UNREADABLE as error:
            what = f"{STATE}: {name}: {_words(error)}"
            raise _damaged(self._store, self.name, what) from error

    @property
    def kernels(self) -> dict[str, str]:
        """Return the kernels that the run computed with, by topic, as `Backbone.prepare` did.

        Raises:
            CheckpointError: They are no text.
        """
        return self.read(
            "choices", lambda found: {key: block(text, str, key) for key, text in found.items()}
        )

    def damaged(self, what: str) -> CheckpointError:
        """Return the error that says what is wrong with this checkpoint."""
        return _damaged(self._store, self.name, what)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor of any type holds neither nan nor inf."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # float8 has no isfinite of its own.
    exact = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(exact).all())


_UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What readers of JSON by strangers raise."""


_BLOCKS: Mapping[str, type] = {
    **dict.fromkeys(("alarm", "averages", "optimizers", "choices"), dict),
    "data": list,
}
"""What `state.json` of a run has, if it has it; their readers check what is inside."""


def _words(error: Exception) -> str:
    """Return what an error says, with its kind where the text alone says little."""
    if type(error) is KeyError:
        return f"has no {error}"
    return str(error) if isinstance(error, ValueError | TypeError) else repr(error)


@attrs.frozen
class About:
    """The origin of a checkpoint: its format, time in ISO 8601, the one before it, versions."""

    version: int
    created: str = ""
    parent: str | None = None
    environment: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Manifest:
    """Content of `MANIFEST.json`: counters, files, names that share a stored tensor, latents."""

    about: About
    images: int
    step: int
    files: dict[str, tuple[int, str]]  # bytes and hash by file name
    aliases: dict[str, dict[str, str]]
    latent: dict[str, dict[str, Any]] = attrs.field(factory=dict)  # contract by file


def open_one(
    store: Store,
    name: str,
    verify: bool,
    steps: Mapping[int, Step] = STEPS,
    to: int = FORMAT_VERSION,
) -> Checkpoint:
    """Open a checkpoint; `verify` hashes every file of it now.

    `steps` convert earlier formats to the next ones, until it is of format `to`.

    Raises:
        CheckpointError: It is missing, damaged or of a newer format.
    """
    manifest = _read_manifest(store, name, to)
    version = manifest.about.version
    for file in manifest.files:
        if verify and file != STATE:
            _content(store, name, manifest, file, keep=False)
    try:
        state = finite_json(_content(store, name, manifest, STATE))
    except (ValueError, RecursionError) as error:
        raise _damaged(store, name, f"{STATE}: {error}") from error
    try:
        body = migrate(Body(block(state, dict, "it"), manifest.latent), version, steps, to)
        for found, kind in _BLOCKS.items():
            if found in body.state:
                block(body.state[found], kind, found)
    except _UNREADABLE as error:
        what = f"{STATE} cannot be read as format {version} ({_words(error)})"
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
    """Return the value if JSON preserves it; json.dumps would silently turn keys into text.

    Raises:
        CheckpointError: It is something else.
        DivergedError: A number is nan or inf, which is refused when it is read.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise DivergedError(
            f"{where} is {value}; this checkpoint was not written, the older ones are intact."
        )
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


def _read_manifest(store: Store, name: str, newest: int) -> Manifest:
    """Read the manifest, after checking its hash, the set of files and their sizes."""
    try:
        plain = name not in {"", ".", ".."} and not re.search(r"[/\\\0]", name)
        present = set(store.list(f"{FOLDER}/{name}")) if plain else set()
        if not present:
            raise CheckpointError(f"{store.where(f'{FOLDER}/{name}')}: no such checkpoint.")
        if MANIFEST not in present:
            raise _damaged(store, name, f"{MANIFEST} is missing, so its save never finished")
        raw = store.read(f"{FOLDER}/{name}/{MANIFEST}", LIMIT)
        manifest = _parse_manifest(store, name, raw, newest)
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


def _parse_manifest(store: Store, name: str, raw: bytes, newest: int) -> Manifest:
    try:
        body = finite_json(raw)
        version = body["format_version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version is {version!r}")
        del body["sha256"]
        # Compare the text, not only the hash, so that nothing in the file is left unchecked; first
        # of all, as a flipped bit can make the version a later one. Every format is sealed so.
        if sealed(body) != raw:
            raise _damaged(store, name, f"{MANIFEST} does not match its own hash")
        if version > newest:
            raise NewerFormatError(
                f"{store.where(f'{FOLDER}/{name}')}: was written by a newer e2ediff (checkpoint "
                f"format {version}, this one reads {newest}). Upgrade e2ediff."
            )
        files = {f: _entry(f, e) for f, e in block(body["files"], dict, "files").items()}
        aliases = {str(file): dict(names) for file, names in body["aliases"].items()}
        latent = {str(file): dict(found) for file, found in body.get("latent", {}).items()}
        counts = (count(body["images"], "images"), count(body["step"], "step"))
        about = About(
            version,
            block(body.get("created", ""), str, "created"),
            body.get("parent") and block(body["parent"], str, "parent"),
            block(body.get("environment", {}), dict, "environment"),
        )
        manifest = Manifest(about, *counts, files, aliases, latent)
    except _UNREADABLE as error:
        raise _damaged(store, name, f"{MANIFEST} is unreadable ({_words(error)})") from error
    match = NAME.fullmatch(name)
    if match and int(match[1]) != manifest.images:
        raise _damaged(store, name, f"its {MANIFEST} is of {manifest.images} images")
    return manifest


def _entry(file: str, entry: Mapping[str, object]) -> tuple[int, str]:
    """Return size and hash of a file as the manifest has them."""
    if file != STATE and not _FILE.fullmatch(file):
        raise ValueError(f"{_short(file)} is no name of a file of a checkpoint")
    digest = block(entry["sha256"], str, f"sha256 of {file}")
    if not _SHA256.fullmatch(digest):
        raise ValueError(f"sha256 of {file} is {_short(digest)}")
    return count(entry["bytes"], f"bytes of {file}"), digest


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
