"""Recognise runs that were made here, by a seal that a stranger cannot forge.

A seal is the HMAC-SHA256 of a run's resolved recipe under a key that only this user can read.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable, Sequence

from e2ediff.errors import RunDirectoryError
from e2ediff.host.leaves import texts_in
from e2ediff.limits import MAX_GRAPH
from e2ediff.store.storage import Store

SEAL = "seal"
"""The file of a run's seals, a line for each resolved recipe that it may have."""

_BYTES = 32
_LONGEST = 4096  # bytes of the file


def key_file() -> str:
    """Return the path of this user's key, which is made when the first run is sealed.

    It is in the user's folder for state, $XDG_STATE_HOME or `~/.local/state`, and not in the
    cache, which several users may share. Whoever reads it can seal runs in this user's name.
    """
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(home, "e2ediff", "key")


def seal(text: bytes) -> str:
    """Return the seal of a resolved recipe; "" if this user can have no key."""
    key = _key(make=True)
    return hmac.new(key, text, hashlib.sha256).hexdigest() if key else ""


def is_sealed(store: Store, file: str) -> bool:
    """Return whether the resolved recipe in this file of a run has this user's seal."""
    if not (key := _key(make=False)):
        return False
    try:
        text, seals = store.read(file, MAX_GRAPH), store.read(SEAL, _LONGEST).split()
    except OSError:
        return False
    own = hmac.new(key, text, hashlib.sha256).hexdigest().encode()
    return any(hmac.compare_digest(own, one) for one in seals)


def refuse_networks(
    place: str, named: Iterable[tuple[str, str]], typed: Sequence[str], *, trust: bool
) -> None:
    """Refuse networks that a run names which was not made here.

    Args:
        place: The run.
        named: Path in the resolved recipe, and address, of each.
        typed: Assignments of `--set`, whose addresses are the user's own.
        trust: Whether the user accepts all of them.

    Raises:
        RunDirectoryError: There is one that the user has not accepted; nothing was opened.
    """
    own = {text for one in typed for text in texts_in(one.partition("=")[2])}
    others = [(path, address) for path, address in named if address not in own]
    if others and not trust:
        listed = ", ".join(f"{path} ({address!r})" for path, address in others)
        raise RunDirectoryError(
            f"{place}: was not made here by you, and names other files to open: {listed}. Check "
            "what that is; --trust opens it, and --set chooses another address"
        )


def _key(*, make: bool) -> bytes:
    """Read this user's key; b"" if there is none, or it could be someone else's."""
    path = key_file()
    for attempt in (0, 1):
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK)
            try:
                found = os.fstat(file)
                private = stat.S_ISREG(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
                ours = found.st_uid == os.getuid()
                key = os.read(file, _BYTES + 1)
            finally:
                os.close(file)
            return key if private and ours and len(key) == _BYTES else b""
        if not make or attempt:
            break
        with contextlib.suppress(OSError):
            _make_key(path)
    return b""


def _make_key(path: str) -> None:
    """Write a new key, whole or not at all; one that exists stays."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    temporary = f"{path}.{secrets.token_hex(8)}"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "wb") as new:
            new.write(secrets.token_bytes(_BYTES))
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
