"""Try work on a stranger's file in a process of its own, which may crash or hang."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch

from e2ediff.limits import free_memory

SECONDS = 120
"""Processor time of a trial, on one thread: a ViT-g of 518 pixels takes half of it."""
WAIT = 2 * SECONDS
"""Seconds after which it is ended in any case."""
MEMORY = 8 << 30
"""Bytes that a trial may take besides those that it starts with; less where less is free."""


def tried(work: Callable[[], object]) -> str:
    """Do a piece of work in a copy of this process; return why it failed, "" if it did not.

    The copy computes on the CPU with one thread. Its end, whatever it is, is not that of this
    process. Where processes cannot be copied safely, which is anywhere but on Linux, the work is
    done in this one.
    """
    if sys.platform != "linux":
        return _outcome(work)
    reader, writer = os.pipe()
    with warnings.catch_warnings(action="ignore"):  # of threads, of which the copy has none
        child = os.fork()
    if child == 0:
        os.close(reader)
        _work_alone(work, writer)
    os.close(writer)
    try:
        said = _until_end(reader)
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if said is None:
        return f"it took longer than {WAIT} seconds"
    if said:
        return said[1:]
    return _of_signal(status)


def _work_alone(work: Callable[[], object], writer: int) -> None:
    """Do the work and write its outcome, after one letter that says that there is one."""
    try:
        import resource

        for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(caught, signal.SIG_DFL)
        with open("/proc/self/statm", encoding="ascii") as file:
            own = int(file.read().split()[0]) * resource.getpagesize()
        most = own + min(MEMORY, free_memory() or MEMORY)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print as they crash
        os.write(writer, b"." + _outcome(work).encode(errors="replace")[:4000])
    finally:
        os._exit(0)  # without what this process would do at its end


def _outcome(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        said = str(error).partition("\n")[0]
        if isinstance(error, LookupError) or not said:
            return f"{type(error).__name__}: {said}" if said else type(error).__name__
        return said
    return ""


def _until_end(reader: int) -> str | None:
    """Return what the copy wrote, "" if it ended without a word, None if it is still at work."""
    end, said = time.monotonic() + WAIT, b""
    while True:
        if not select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            return None
        piece = os.read(reader, 4096)
        if not piece:
            return said.decode(errors="replace")
        said += piece


def _of_signal(status: int) -> str:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGXCPU, signal.SIGKILL):
        return f"it took longer than {SECONDS} seconds or all memory"
    name = signal.Signals(number).name if number else "no word"
    return f"it crashed the process that tried it ({name})"
