"""The number of CPU threads that a command was given, and how they wait.

Nothing here loads torch: OpenMP reads how threads wait once, when torch is loaded.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from e2ediff.errors import E2EDiffError

_MOST = 1024  # more would exhaust the system before anything is computed
_LOOKS = 5
_APART = 0.004  # seconds between two looks: a single one sees one slice of the scheduler's time


def threads_of(asked: str) -> int | None:
    """The number that `--threads` means; None is `auto`.

    Raises:
        E2EDiffError: It is neither a number nor `auto`.
    """
    if asked == "auto":
        return None
    if not (asked.isdecimal() and 0 < int(asked) <= _MOST):
        what = f"expected a number of threads from 1 to {_MOST}, or auto"
        raise E2EDiffError(f"--threads {asked!r}: {what}")
    return int(asked)


def prepare_threads(asked: str) -> int | None:
    """Prepare this process for what `--threads` means; call it before torch is loaded.

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
    """How many threads OpenMP would use here: `OMP_NUM_THREADS`, or the cores of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return _cores() or os.cpu_count() or 1


def let_waiting_threads_sleep() -> None:
    """On busy cores, have OpenMP's threads sleep while they wait.

    By default they spin, which is faster by 6 to 25 % on idle cores, and takes the cores from
    the threads that are waited for where other processes use them as well.
    """
    given = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ)
    if not given and _busy():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _cores() -> int:
    """The cores that this process may use; 0 where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def _busy() -> bool:
    """Whether other processes compute on cores that all of this one's threads would need."""
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
    """Threads of the machine that run or could run at this moment, this one among them."""
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
