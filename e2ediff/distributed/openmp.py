"""Set the number of CPU threads of a command, and how they wait.

Nothing here loads torch, because OpenMP reads its wait policy once, when torch is loaded.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from e2ediff.errors import E2EDiffError

MOST_THREADS = 1024
"""More would exhaust the system."""

_LOOKS = 5
_APART = 0.004  # seconds between two samples: a single one sees one time slice of the scheduler


def threads_of(asked: str) -> int | None:
    """Parse `--threads`; None is `auto`.

    Raises:
        E2EDiffError: It is neither a number nor `auto`.
    """
    if asked == "auto":
        return None
    if not (asked.isdecimal() and 0 < int(asked) <= MOST_THREADS):
        what = f"expected a number of threads from 1 to {MOST_THREADS}, or auto"
        raise E2EDiffError(f"--threads {asked!r}: {what}")
    return int(asked)


def prepare_threads(asked: str) -> int | None:
    """Prepare this process for `--threads`; call it before torch is loaded.

    Raises:
        E2EDiffError: It is neither a number nor `auto`.
    """
    number = threads_of(asked)
    if number is None:
        let_waiting_threads_sleep()
    else:
        import torch

        torch.set_num_threads(number)
    return number


def all_threads() -> int:
    """Return how many threads OpenMP would use: `OMP_NUM_THREADS`, or the available cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return _cores() or os.cpu_count() or 1


def let_waiting_threads_sleep() -> None:
    """Let OpenMP's threads sleep while they wait, if cores are busy.

    By default they spin, which is faster by 6 to 25 % on idle cores, but on cores shared with
    other processes takes time from the threads that are waited for.
    """
    given = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ)
    if not given and _busy():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _cores() -> int:
    """Return the number of cores that this process may use; 0 if unknown."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def _busy() -> bool:
    """Return whether other processes use cores that this one's threads would need."""
    free = (os.cpu_count() or 1) - _cores()
    running = []
    try:
        for _ in range(_LOOKS):
            running.append(_running())
            time.sleep(_APART)
    except (OSError, ValueError, IndexError):
        return False  # not Linux
    return sorted(running)[_LOOKS // 2] - 1 > free


def _running() -> int:
    """Return the number of runnable threads of the machine, including this one."""
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
