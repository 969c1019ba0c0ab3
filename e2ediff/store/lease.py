"""Keep two writers apart in a store that has no locks: one holds a lease, and renews it.

The lease is a file with its owner and the time at which it ends. The owner renews it in a thread
and reads it before every change; another process refuses to begin while it is valid. The lease of
a process that was killed ends by itself. Clocks of the machines must agree to a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from e2ediff.errors import RunDirectoryError
from e2ediff.store.environment import machine
from e2ediff.store.storage import Store

LEASE = 180.0
"""Seconds for which a lease is valid after it was renewed; it is renewed three times as often."""

_READS = 3  # before a lease counts as another's: a store may return other bytes once than it holds
_SETTLED = 1.0  # seconds after which one of several that took a lease at once sees who has it


class Lease:
    """A lease on a store, from `take` until `release`; `shown` is the address for messages."""

    def __init__(self, store: Store, path: str, shown: str) -> None:
        self._store = store
        self._path = path
        self._shown = shown
        self._owner = secrets.token_hex(8)
        self._valid_until = 0.0
        self._lost = ""
        self._mutex = threading.Lock()
        self._ended = threading.Event()

    def take(self, is_alive: Callable[[int], bool]) -> None:
        """Take the lease, and renew it in a thread from now on.

        `is_alive` tells whether a process of this machine exists.

        Raises:
            RunDirectoryError: Another process holds it.
            ResourceError: It cannot be written.
        """
        found = self._read()
        if found and not self._has_ended(found, is_alive):
            raise RunDirectoryError(self._refusal(found))
        if found:
            self._store.remove_file(self._path)
        alone = self._store.create(self._path, self._text())
        if found or not alone:
            time.sleep(_SETTLED)
        if now := self._others():
            raise RunDirectoryError(self._refusal(now))
        self._store.guard = self.check
        threading.Thread(target=self._keep, daemon=True).start()

    def check(self) -> None:
        """Make sure that this process still holds the lease.

        Raises:
            RunDirectoryError: Another process took it. It stays so.
            OSError: The store cannot be reached.
        """
        with self._mutex:
            self._check()

    def release(self) -> None:
        """Give the lease back, if it is still held and the store can be reached."""
        self._ended.set()
        with self._mutex, contextlib.suppress(OSError):
            self._store.guard = None
            if not self._lost and not self._others():
                self._store.remove_file(self._path)

    def _check(self, *, renew: bool = False) -> None:
        if not self._lost and (found := self._others()):
            self._lost = self._refusal(found, "has taken over the lease on this run")
        if self._lost:
            raise RunDirectoryError(self._lost)
        if renew or time.monotonic() > self._valid_until:
            self._store.upload(self._path, self._text())

    def _others(self) -> dict[str, Any]:
        """Return the lease in the store if it is another's; empty if it is not, or missing."""
        for _ in range(_READS):
            found = self._read()
            if not found or found.get("owner") == self._owner:
                return {}
        return found

    def _keep(self) -> None:
        while not self._ended.wait(LEASE / 3):
            # A store out of reach is tried again before the next change, which is also refused
            # if the lease is lost.
            with self._mutex, contextlib.suppress(Exception):
                if not self._ended.is_set():
                    self._check(renew=True)

    def _text(self) -> bytes:
        self._valid_until = time.monotonic() + LEASE
        until = datetime.now(UTC) + timedelta(seconds=LEASE)
        values = {
            "owner": self._owner,
            "process": os.getpid(),
            "machine": _here(),
            "until": until.isoformat(timespec="milliseconds"),
        }
        return json.dumps(values).encode() + b"\n"

    def _read(self) -> dict[str, Any]:
        """Return the lease in the store; empty if there is none."""
        try:
            values = json.loads(self._store.read(self._path, 10_000))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            return {"owner": "", "until": ""}  # damaged, and taken over
        return values if isinstance(values, dict) else {}

    def _has_ended(self, found: Mapping[str, Any], is_alive: Callable[[int], bool]) -> bool:
        pid = found.get("process")
        if found.get("machine") == _here() and isinstance(pid, int) and not is_alive(pid):
            return True
        try:
            return datetime.fromisoformat(str(found.get("until"))) < datetime.now(UTC)
        except (ValueError, TypeError):
            return True

    def _refusal(self, found: Mapping[str, Any], what: str = "is training in it") -> str:
        here = found.get("machine") == _here()
        who = f"process {found.get('process')}{'' if here else ' on another machine'}"
        return (
            f"{self._shown}: {who} {what}; its lease ends at {found.get('until')} unless it "
            "is renewed. Wait for it to end or stop it, or choose another --out."
        )


def _here() -> str:
    """Identify the machine and, for containers that share its name, their process numbers."""
    try:
        return f"{machine()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return machine()
