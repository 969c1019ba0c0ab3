"""Checkpoints that are whole or absent, and never believed unless their hashes agree.

A checkpoint is a directory `checkpoints/images-000000256000/`: one safetensors file for each
group of tensors, `state.json` for all that is no tensor, and `MANIFEST.json`, which lists the
others with sizes and SHA-256 and is written last. Locally all of it is written under another
name and renamed; on other stores the manifest is the commit mark. Nothing is ever pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import attrs
import safetensors
import torch
from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor, nn

import e2ediff
from e2ediff.errors import CheckpointError, DivergedError, E2EDiffError
from e2ediff.run.storage import JSON, Store

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
STATE = "state.json"
FORMAT_VERSION = 1

_LIMIT = 1 << 24  # bytes of JSON that are read at all
_NAME = re.compile(r"(?:abandoned-)?images-(\d{12,18})(?:-r(\d{1,6}))?")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_warn = logging.getLogger(__name__).warning


@attrs.frozen
class Checkpoint:
    """An opened checkpoint: its counters and state are read, its tensors on demand."""

    name: str
    path: str
    images: int
    step: int
    state: dict[str, Any]
    files: tuple[str, ...]
    _store: Store = attrs.field(repr=False)
    _manifest: _Manifest = attrs.field(repr=False)

    def tensors(self, file: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of one file; names that shared memory when saved share it again.

        Raises:
            CheckpointError: there is no such file in it, or its content is damaged.
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
        return tensors


@attrs.frozen
class _Manifest:
    images: int
    step: int
    files: dict[str, tuple[int, str]]  # bytes and hash by file name
    aliases: dict[str, dict[str, str]]


def save(
    store: Store,
    images: int,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    keep: int,
    warn: Callable[[str], None] = _warn,
) -> str:
    """Write a checkpoint, make it durable, then retire old ones; returns its name.

    One of the same images count is replaced; some checkpoint is valid at every moment.
    Checkpoints of *more* images belong to a future that was rewound: they are renamed to
    `abandoned-...` and left alone. `keep` newest ones stay (0: all). Trouble with old
    checkpoints is told to `warn` and never stops training.

    Raises:
        CheckpointError: something is neither a tensor nor JSON. Nothing was written.
        DivergedError: a tensor holds nan or inf. Nothing was written.
        ResourceError: the disk or store refused. The older checkpoints are intact.
    """
    name = f"images-{images:012d}"
    text = _json(_plain(state, STATE))
    unique, aliases = {}, {}
    for file, tensors in files.items():
        if not _FILE.fullmatch(file) or f"{file}.safetensors" == STATE:
            raise CheckpointError(f"{name}: {file!r} cannot be the name of a checkpoint file.")
        unique[file], aliases[file] = _deduplicated(file, tensors)
    needed = len(text) + sum(
        t.numel() * t.element_size() for group in unique.values() for t in group.values()
    )
    try:
        final, parent = _prepare(store, name, needed, warn)
        body: dict[str, JSON] = {
            "format_version": FORMAT_VERSION,
            "images": images,
            "step": step,
            "aliases": {file: found for file, found in aliases.items() if found},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "parent": parent,
            "environment": versions(),
        }
        hidden = f".tmp-{name}-{secrets.token_hex(4)}"
        folder = f"{FOLDER}/{hidden if store.local else final}"
        try:
            _write(store, folder, final, unique, text, body)
        except BaseException:
            store.remove_dir(folder)
            raise
    except OSError as error:
        raise store.refusal(f"{FOLDER}/{name}", needed, error) from error
    try:
        final = _supersede(store, final, name, warn)
        _retire(store, final, keep, warn)
    except (OSError, E2EDiffError) as error:
        warn(f"old checkpoints could not be retired: {error}")
    return final


def list_checkpoints(store: Store) -> list[str]:
    """Names of the checkpoints of a run, oldest first, damaged ones included.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        found = [(_NAME.fullmatch(name), name) for name in store.list(FOLDER)]
    except OSError as error:
        raise CheckpointError(f"{store.where(FOLDER)}: cannot be read: {error}") from error
    known = [(int(m[1]), int(m[2] or 0), n) for m, n in found if m and n.startswith("images-")]
    return [name for _, _, name in sorted(known)]


def open_checkpoint(
    store: Store,
    name: str | None = None,
    verify: bool = True,
    warn: Callable[[str], None] = _warn,
) -> Checkpoint:
    """Open one checkpoint by name, or the newest that verifies.

    `verify` hashes every file now; without it the file set and the sizes are checked now,
    and each file's hash when `tensors` reads it.

    Raises:
        CheckpointError: the named one is missing, damaged or of a newer format, or there is
            none that verifies. Damaged ones that were skipped are told to `warn`.
    """
    if name is not None:
        try:
            return _open(store, name, verify)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {_way_out(store, name)}") from error
    problems = []
    for candidate in reversed(list_checkpoints(store)):
        try:
            return _open(store, candidate, verify)
        except CheckpointError as error:
            problems.append(str(error))
            warn(f"skipped {error}")
    if not problems:
        raise CheckpointError(f"{store.where(FOLDER)}: there is no checkpoint yet.")
    raise CheckpointError(
        "\n  ".join([f"{store.where(FOLDER)}: no checkpoint verifies.", *problems])
    )


def versions() -> dict[str, str]:
    """Versions of what a checkpoint's bits depend on."""
    return {
        "e2ediff": e2ediff.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "safetensors": safetensors.__version__,
    }


# Writing


def _plain(value: object, where: str) -> JSON:
    """The value if JSON keeps it as it is; json.dumps would quietly turn keys into text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise CheckpointError(
        f"{where}: a {type(value).__name__} cannot be saved as JSON; "
        "save tensors in a tensor file, the rest as numbers, text, lists and string-keyed dicts."
    )


def _json(value: JSON) -> bytes:
    data = json.dumps(value, indent=1).encode() + b"\n"
    if len(data) > _LIMIT:
        raise CheckpointError(f"{STATE}: {len(data):,} bytes is over the limit of {_LIMIT:,}.")
    return data


def _deduplicated(
    file: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to store, and alias -> stored name for tensors that are one and the same."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            kind = type(tensor).__name__
            raise CheckpointError(f"{file}: {name}: only dense tensors are saved, not {kind}.")
        if tensor.is_floating_point() or tensor.is_complex():
            # float8 has no isfinite of its own.
            exact = tensor.float() if tensor.element_size() == 1 else tensor
            bad = exact.numel() - int(torch.isfinite(exact).sum())
            if bad:
                raise DivergedError(
                    f"{file}: {name} holds nan or inf ({bad:,} of {exact.numel():,} values); "
                    "this checkpoint was not written, the older ones are intact."
                )
        # Views of the same memory that differ in shape are stored apart: values are kept.
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            stored[name] = tensor
    return stored, aliases


def _prepare(
    store: Store, name: str, needed: int, warn: Callable[[str], None]
) -> tuple[str, str | None]:
    """Sweep what crashes left, check the space; returns a free name, and the parent's."""
    for found in store.list(FOLDER):
        if found.startswith((".tmp-", ".trash-")):
            _report(store.remove_dir(f"{FOLDER}/{found}"), store, found, warn)
    free = store.free_bytes()
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    names = list_checkpoints(store)
    older = [found for found in names if found < name]
    revisions = []
    for found in names:
        if found == name or found.startswith(f"{name}-r"):
            if store.exists(f"{FOLDER}/{found}/{MANIFEST}"):
                revisions.append(int(found.partition("-r")[2] or 0))
            else:
                _discard(store, found, warn)
    final = f"{name}-r{max(revisions) + 1}" if revisions else name
    return final, older[-1] if older else None


def _write(
    store: Store,
    folder: str,
    name: str,
    files: Mapping[str, Mapping[str, Tensor]],
    state: bytes,
    body: Mapping[str, JSON],
) -> None:
    """Fill a folder, its manifest last, and give it its name."""
    written: dict[str, JSON] = {}

    def put(file: str, data: bytes) -> None:
        store.write(f"{folder}/{file}", data)
        written[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for file, tensors in files.items():
        try:
            data = encode(_apart(tensors))
        except (safetensors.SafetensorError, RuntimeError, ValueError, LookupError) as error:
            raise CheckpointError(f"{file}: cannot be saved: {error}") from error
        put(f"{file}.safetensors", data)
    put(STATE, state)
    store.write(f"{folder}/{MANIFEST}", _sealed({**body, "files": written}))
    if folder != f"{FOLDER}/{name}":
        failed = store.rename_dir(folder, f"{FOLDER}/{name}")
        if failed:
            raise failed


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous and on the CPU; safetensors refuses views of one memory, so they are copied."""
    dense: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        dense[name] = own.clone() if place in seen and own.numel() else own
        seen.add(place)
    return dense


def _supersede(store: Store, saved: str, name: str, warn: Callable[[str], None]) -> str:
    """Drop earlier saves of the same count; the new one then takes their plain name."""
    if saved == name:
        return name
    for found in list_checkpoints(store):
        if found != saved and (found == name or found.startswith(f"{name}-r")):
            _discard(store, found, warn)
    if not store.local or store.rename_dir(f"{FOLDER}/{saved}", f"{FOLDER}/{name}"):
        return saved
    return name


def _retire(store: Store, saved: str, keep: int, warn: Callable[[str], None]) -> None:
    names = list_checkpoints(store)
    for later in names[names.index(saved) + 1 :]:
        taken = store.list(FOLDER)
        number = next(i for i in range(1, 10**6) if _abandoned(later, i) not in taken)
        target = f"{FOLDER}/{_abandoned(later, number)}"
        _report(store.rename_dir(f"{FOLDER}/{later}", target), store, later, warn)
    names = names[: names.index(saved) + 1]
    if keep <= 0 or len(names) <= keep:
        return
    sound = [name for name in names if _is_sound(store, name, verify=False)]
    kept = sound[-keep:]
    # Sizes do not prove content: one that is kept must verify before others are deleted.
    if not any(_is_sound(store, name, verify=True) for name in reversed(kept)):
        warn(f"{store.where(FOLDER)}: none of {', '.join(kept)} verifies; old ones are kept.")
        return
    for name in names[: names.index(kept[0])]:
        _discard(store, name, warn)


def _abandoned(name: str, number: int) -> str:
    plain = name.partition("-r")[0]
    return f"abandoned-{plain}" + (f"-r{number}" if number > 1 else "")


def _discard(store: Store, name: str, warn: Callable[[str], None]) -> None:
    """Delete so that what a crash leaves of it is never taken for a checkpoint."""
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


# Reading


def _sealed(body: Mapping[str, JSON]) -> bytes:
    """The manifest's text, with the hash of all the rest as its last entry."""
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": seal}, indent=1).encode() + b"\n"


def _open(store: Store, name: str, verify: bool) -> Checkpoint:
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
    files = tuple(f.removesuffix(".safetensors") for f in manifest.files if f != STATE)
    where = store.where(f"{FOLDER}/{name}")
    return Checkpoint(name, where, manifest.images, manifest.step, state, files, store, manifest)


def _read_manifest(store: Store, name: str) -> _Manifest:
    """The manifest, once it, the set of files and their sizes are as they were written."""
    try:
        plain = name not in {"", ".", ".."} and not re.search(r"[/\\\0]", name)
        present = set(store.list(f"{FOLDER}/{name}")) if plain else set()
        if not present:
            raise CheckpointError(f"{store.where(f'{FOLDER}/{name}')}: no such checkpoint.")
        if MANIFEST not in present:
            raise _damaged(store, name, f"{MANIFEST} is missing, so its save never finished")
        raw = store.read(f"{FOLDER}/{name}/{MANIFEST}", _LIMIT)
        manifest = _parse_manifest(store, name, raw)
        listed = {MANIFEST, *manifest.files}
        if missing := sorted(listed - present):
            raise _damaged(store, name, f"missing: {', '.join(missing)}")
        if extra := sorted(present - listed):
            raise _damaged(store, name, f"files that do not belong to it: {', '.join(extra)}")
        for file, (expected, _) in manifest.files.items():
            if file == STATE and expected > _LIMIT:
                raise _damaged(store, name, f"{file} is over the limit of {_LIMIT:,} bytes")
            if (size := store.size(f"{FOLDER}/{name}/{file}")) != expected:
                raise _damaged(
                    store, name, f"{file} has {size:,} bytes, it was written with {expected:,}"
                )
    except OSError as error:
        raise _damaged(store, name, f"cannot be read: {error}") from error
    return manifest


def _parse_manifest(store: Store, name: str, raw: bytes) -> _Manifest:
    try:
        body = json.loads(raw)
        version = body["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{store.where(f'{FOLDER}/{name}')}: was written by a newer e2ediff (checkpoint "
                f"format {version}, this one reads {FORMAT_VERSION}). Upgrade e2ediff."
            )
        del body["sha256"]
        # Equal text is more than an equal hash: nothing in the file is left unchecked.
        if _sealed(body) != raw:
            raise _damaged(store, name, f"{MANIFEST} does not match its own hash")
        files = {str(f): (int(e["bytes"]), str(e["sha256"])) for f, e in body["files"].items()}
        aliases = {str(file): dict(names) for file, names in body["aliases"].items()}
        manifest = _Manifest(int(body["images"]), int(body["step"]), files, aliases)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise _damaged(store, name, f"{MANIFEST} is unreadable ({error})") from error
    match = _NAME.fullmatch(name)
    if match and int(match[1]) != manifest.images:
        raise _damaged(store, name, f"its {MANIFEST} is of {manifest.images} images")
    return manifest


def _content(store: Store, name: str, manifest: _Manifest, file: str, keep: bool = True) -> bytes:
    """The bytes of a file (if `keep`), hashed as read: what is parsed is what was checked."""
    if file not in manifest.files:
        raise _damaged(store, name, f"missing: {file}")
    digest, pieces = hashlib.sha256(), []
    try:
        for piece in store.chunks(f"{FOLDER}/{name}/{file}"):
            digest.update(piece)
            if keep:
                pieces.append(piece)
    except OSError as error:
        raise _damaged(store, name, f"{file} cannot be read: {error}") from error
    if digest.hexdigest() != manifest.files[file][1]:
        raise _damaged(store, name, f"{file} does not match its hash in {MANIFEST}")
    return b"".join(pieces)


def _damaged(store: Store, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{store.where(f'{FOLDER}/{name}')}: the checkpoint is damaged: {what}."
    )


def _is_sound(store: Store, name: str, verify: bool) -> bool:
    try:
        _open(store, name, verify)
    except CheckpointError:
        return False
    return True


def _way_out(store: Store, name: str) -> str:
    names = [n for n in list_checkpoints(store) if n != name]
    older = [n for n in reversed(names) if n < name]
    for candidate in [*older, *(n for n in reversed(names) if n > name)]:
        if _is_sound(store, candidate, verify=True):
            return f"{candidate} verifies: use --checkpoint {candidate}."
    return "No other checkpoint of this run verifies."


# Optimizer states

# Which kernels step the optimizer is a matter of the machine at hand, not of the state.
_KERNELS = {"foreach", "fused", "capturable", "differentiable"}


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """An optimizer's state as tensors `{parameter name}.{key}`, and the rest as JSON.

    Raises:
        CheckpointError: a value is neither a tensor nor JSON, or two tensors get one name.
    """
    tensors: dict[str, Tensor] = {}

    def split(prefix: str, values: Mapping[str, Any]) -> dict[str, JSON]:
        plain: dict[str, JSON] = {}
        held: dict[str, str] = {}
        for key, value in values.items():
            where = f"{prefix}.{key}"
            if not isinstance(value, Tensor):
                plain[key] = _plain(value, f"optimizer: {where}")
            elif where in tensors:
                raise CheckpointError(f"optimizer: {where!r} names two tensors of the state.")
            else:
                tensors[where] = value
                held[key] = where
        return {"values": plain, "tensors": held}

    groups: list[JSON] = []
    states: dict[str, JSON] = {}
    for i, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k not in {"params", "param_names"}}
        members = [names[p] for p in group["params"]]
        groups.append({"parameters": members, **split(f"group-{i}", options)})
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            away = [k for k, v in state.items() if isinstance(v, Tensor) and v.device != p.device]
            states[names[p]] = {"shape": [*p.shape], "away": away, **split(names[p], state)}
    return tensors, {"groups": groups, "states": states}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Put back what `flatten_optimizer` gave, bit for bit; on an error nothing changes.

    Unlike torch's `load_state_dict` nothing is cast to the parameter's dtype. Options that
    only choose kernels (`fused`, `foreach`, ...) stay those of this optimizer.

    Raises:
        CheckpointError: parameters, groups or shapes are not those of this optimizer.
    """
    groups: list[dict[str, Any]] = []
    restored: dict[nn.Parameter, dict[str, Any]] = {}
    try:
        parts = [*state["groups"], *state["states"].values()]
        _same("tensors", {n for part in parts for n in part["tensors"].values()}, set(tensors))
        live = {f"group {i}" for i in range(len(optimizer.param_groups))}
        _same("groups", live, {f"group {i}" for i in range(len(state["groups"]))})
        for i, (group, saved) in enumerate(
            zip(optimizer.param_groups, state["groups"], strict=True)
        ):
            members = {names[p] for p in group["params"]}
            _same(f"parameters of group {i}", members, set(saved["parameters"]))
            options: dict[str, Any] = {k: tensors[n].clone() for k, n in saved["tensors"].items()}
            for key, value in saved["values"].items():
                if key not in _KERNELS:
                    pair = isinstance(group.get(key), tuple)  # JSON has lists only
                    options[key] = tuple(value) if pair else value
            groups.append(options)
            for p in group["params"]:
                restored[p] = _state_of(p, names[p], group, tensors, state["states"][names[p]])
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"optimizer: its saved state is incomplete: {error!r}.") from error
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)
    optimizer.state.clear()
    optimizer.state.update({p: values for p, values in restored.items() if values})


def _state_of(
    p: nn.Parameter,
    name: str,
    group: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    if saved["shape"] != [*p.shape]:
        raise CheckpointError(
            f"optimizer: the state of {name} is for shape {tuple(saved['shape'])}, "
            f"the parameter has {tuple(p.shape)}. Resume with the recipe it was trained with."
        )
    state: dict[str, Any] = dict(saved["values"])
    for key, where in saved["tensors"].items():
        value = tensors[where].detach()
        host = key in saved["away"]
        if key == "step" and not value.dim():  # torch's rule, whatever device it was saved on
            host = not (group.get("fused") or group.get("capturable"))
        device = torch.device("cpu") if host else p.device
        # Fused kernels walk memory in order, so the strides must be the parameter's.
        like = p.detach() if value.shape == p.shape else value
        state[key] = torch.empty_like(like, dtype=value.dtype, device=device).copy_(value)
    return state


def _same(what: str, expected: set[str], found: set[str]) -> None:
    if expected != found:
        missing, extra = (
            ", ".join(sorted(s)[:3]) or "-" for s in (expected - found, found - expected)
        )
        raise CheckpointError(
            f"optimizer: its {what} are not those that were saved: "
            f"missing {missing}; unexpected {extra}. "
            "Resume with the recipe it was trained with."
        )
