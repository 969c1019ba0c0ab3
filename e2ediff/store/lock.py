"""Lock a run directory for one training process; the lock is released when that dies."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from e2ediff import terminal
from e2ediff.addresses import own_file
from e2ediff.errors import RunDirectoryError
from e2ediff.store.environment import machine
from e2ediff.store.lease import Lease
from e2ediff.store.storage import Store

LOCK = ".lock"


def acquire(store: Store, shown: str) -> Callable[[], None] | None:
    """Lock a store for this process; the returned function unlocks it.

    A store that is not local is locked by a lease, which its `guard` checks from then on.

    Args:
        store: The store to lock.
        shown: Its address for messages.

    Returns:
        What unlocks it, or None where locks are not supported: some network file systems, Windows.

    Raises:
        RunDirectoryError: Another process holds it.
        ResourceError: The lock cannot be written.
    """
    if not store.local:
        lease = Lease(store, LOCK, shown)
        lease.take(_is_alive)
        return lease.release
    if sys.platform == "win32":
        return None
    import fcntl  # not on Windows

    path = Path(store.local_path() or "", LOCK)
    if not store.create_dir("", LOCK) and not path.parent.is_dir():
        return None  # the address is a file: the caller reports that
    while True:
        try:
            file = own_file(str(path), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise store.refusal(LOCK, 0, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            try:
                if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
                    terminal.warn(
                        f"{shown}: cannot be locked ({error.strerror}); make sure that only one "
                        "process trains in it."
                    )
                    return None
                _refuse_or_take_over(shown, path, file)
            finally:
                os.close(file)
            continue
        # Another process may have replaced the file that was just locked.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        os.close(file)
    with contextlib.suppress(OSError):  # the text only serves the other process's message
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} {machine()}\n".encode(), 0)
    return partial(os.close, file)


def _refuse_or_take_over(shown: str, path: Path, file: int) -> None:
    holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
    pid, _, where = holder.partition(" ")
    here = where == machine()
    # The kernel frees a dead process's lock, unless its orphaned children still hold it.
    if here and pid.isdigit() and not _is_alive(int(pid)) and _unlink_same(path, file):
        return
    who = f"process {pid}" if pid else "another process"
    raise RunDirectoryError(
        f"{shown}: {who}{'' if here or not pid else ' on another machine'} is training "
        "in it. Wait for it to end or stop it, or choose another --out."
    )


def _unlink_same(path: Path, file: int) -> bool:
    """Remove a stale lock, one process at a time, so that none removes another's new lock."""
    import fcntl

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                path.unlink()
    except OSError:
        return False
    finally:
        os.close(folder)
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
