"""End with the process that started this one, however that ended.

Imports nothing heavy, because processes of a run do this first of all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from e2ediff.distributed.signals import SIGNALS

LAUNCHER = "_E2EDIFF_LAUNCHER"
"""Environment variable: the process that started this one and waits for it."""

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_EACH = 1.0  # seconds between two looks, where the kernel does not report it


def follow(parent: int, number: int = signal.SIGKILL, *, by_kernel: bool = True) -> None:
    """Send this process a signal when its parent is gone, however that ended.

    On Linux the kernel does it, when the *thread* ends that started this process; elsewhere, or
    without `by_kernel`, a thread looks every second.

    Args:
        parent: The process that started this one.
        number: The signal.
        by_kernel: Whether the parent's main thread started this process.
    """
    if not (by_kernel and _asked_of_kernel(number)):
        threading.Thread(target=_look, args=(parent, number), daemon=True).start()
    if os.getppid() != parent:  # it was gone before
        os.kill(os.getpid(), number)


def follow_launcher() -> None:
    """Stop as by SIGTERM when the launcher is gone that started this process, if one did."""
    given = os.environ.pop(LAUNCHER, "")
    if given.isdecimal():
        follow(int(given), signal.SIGTERM)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        follow(os.getppid(), signal.SIGTERM)


def _asked_of_kernel(number: int) -> bool:
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _look(parent: int, number: int) -> None:
    while os.getppid() == parent:
        time.sleep(_EACH)
    os.kill(os.getpid(), number)


def leave_signals_to_parent() -> None:
    """Ignore requests to stop, which the parent answers for all, and end a block of `blocked`."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
