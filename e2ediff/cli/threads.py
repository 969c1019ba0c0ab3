"""The option `--threads`, and what must be set before torch is loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_SAMPLES = 5


class _Threads(click.ParamType[int | None]):
    """A number of threads, or `auto`: None."""

    name = "threads"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> int | None:
        if value is None or value == "auto":
            return None
        if isinstance(value, int) or (value.isdecimal() and int(value) > 0):
            return int(value)
        self.fail(f"{value!r} is no number of threads; give one, or auto", parameter, context)


def threads_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--threads` to a command that computes; its function gets None for `auto`."""
    return click.option(
        "--threads",
        type=_Threads(),
        metavar="N|auto",
        default="auto",
        show_default=True,
        help="CPU threads of each process; auto: one or all, whichever is faster by timing.",
    )(command)


def let_waiting_threads_sleep() -> None:
    """On busy cores, have OpenMP's threads sleep while they wait; call before torch is loaded.

    By default they spin, which is faster by 6 to 25 % on idle cores, and takes the cores from
    the threads that are waited for where others use them as well.
    """
    known = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ)
    if not known and _busy():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def set_threads(count: int | None) -> None:
    """Give torch the number of threads that was asked for; None leaves it as it is."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


def _busy() -> bool:
    """Whether other processes compute on this machine, on cores that all threads would need."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    free = (os.cpu_count() or 1) - cores
    try:
        running = []
        for _ in range(_SAMPLES):
            running.append(_running())
            time.sleep(0.004)  # a moment tells of one slice of the scheduler's time
    except (OSError, ValueError, IndexError):
        return False  # not Linux
    return sorted(running)[_SAMPLES // 2] - 1 > free


def _running() -> int:
    """Threads that run or could run at this moment, this one among them."""
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
