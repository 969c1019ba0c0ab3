"""Processes of this machine: which are children of this one, and how far one has come."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def children(parent: int | None = None) -> list[int]:
    """Return the living children of a process, by default of this one."""
    parent = parent or os.getpid()
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def handles(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def orphans(grace: float) -> list[str]:
    """Wait until no descendants are left; kill those that stay, and return their commands.

    This process must adopt orphans (`trials.adopt_orphans`), and all of its own children must
    have been waited for.
    """
    limit = time.monotonic() + grace
    while left := children():
        _reap()
        if time.monotonic() > limit:
            break
        time.sleep(0.02)
    found = []
    for _ in range(100):
        if not left:
            break
        for pid in left:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                found.append(words.decode(errors="replace").strip()[-200:])
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        _reap()
        left = children()
    _reap()
    return found


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
