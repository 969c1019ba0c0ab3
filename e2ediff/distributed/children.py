"""Compute in processes of their own, none of which outlives this one."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from e2ediff.distributed.allocator import keep_freed_memory
from e2ediff.distributed.parent import follow, leave_signals_to_parent
from e2ediff.distributed.signals import blocked
from e2ediff.errors import E2EDiffError, ResourceError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


@contextlib.contextmanager
def in_processes(
    work: Callable[..., Iterable[Any]],
    shares: Sequence[tuple[Any, ...]],
    *,
    makes: str,
    advice: str,
) -> Iterator[Iterator[tuple[int, Any]]]:
    """Call `work(*share)` in a process for each share; yield its results, with the share's number.

    `work` is a function of a module. Its processes are killed on leaving, and when this process
    dies; signals that reach them are ignored, because this process answers them.

    Args:
        work: Yields results, which are sent here.
        shares: The arguments, for each process.
        makes: What a process did, for messages: "made images".
        advice: What to do if one dies.

    Raises, while results are read:
        E2EDiffError: The error of one of the processes.
        ResourceError: A process died without an error, for instance for lack of memory.
    """
    import torch.multiprocessing

    context = torch.multiprocessing.get_context("spawn")
    started: dict[Connection, tuple[int, BaseProcess]] = {}
    in_main = threading.current_thread() is threading.main_thread()
    try:
        with blocked():  # until each ignores them, after seconds of imports
            for k, share in enumerate(shares):
                ours, theirs = context.Pipe()
                given = (os.getpid(), in_main, work, share, theirs)
                process: BaseProcess = context.Process(target=_compute, args=given)
                process.start()
                theirs.close()  # keep no copy, so that the pipe closes when the process ends
                started[ours] = (k, process)
        yield _results(dict(started), makes, advice)
    finally:
        for ours, (_, process) in started.items():
            process.kill()
            process.join()
            ours.close()


def _results(
    started: dict[Connection, tuple[int, BaseProcess]], makes: str, advice: str
) -> Iterator[tuple[int, Any]]:
    while started:
        for ready in wait(list(started)):
            assert isinstance(ready, Connection)
            k, process = started[ready]
            try:
                found = ready.recv()
            except (EOFError, ConnectionResetError):
                process.join()
                raise ResourceError(
                    f"a process that {makes} ended with code {process.exitcode}, perhaps because "
                    f"memory ran out. {advice}"
                ) from None
            if isinstance(found, E2EDiffError):
                raise found
            if found is None:
                del started[ready]
            else:
                yield k, found[0]


def _compute(
    parent: int,
    by_kernel: bool,
    work: Callable[..., Iterable[Any]],
    share: tuple[Any, ...],
    pipe: Connection,
) -> None:
    keep_freed_memory()
    follow(parent, by_kernel=by_kernel)
    leave_signals_to_parent()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent is gone
        try:
            for result in work(*share):
                pipe.send((result,))
            pipe.send(None)
        except E2EDiffError as error:
            pipe.send(error)
        pipe.poll(None)  # tensors are fetched from this process, so stay until it is killed
