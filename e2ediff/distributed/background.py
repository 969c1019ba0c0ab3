"""Do one thing at a time beside the main thread, and hand over its result or error."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from e2ediff.distributed.signals import SIGNALS

T = TypeVar("T")

_PATIENCE = 10.0  # seconds of waiting after which a user should know for what
_LEAVING = 1.0  # seconds that a task has to end, and then to stop, as the process leaves


class AbandonedError(Exception):
    """The task was told to stop."""


class Background(Generic[T]):
    """A thread that does one task at a time, and does not keep the process alive.

    A task is given `pulse`, and calls it often: it raises `AbandonedError` once the task is
    abandoned. Processes must not be forked while a task runs, as they would inherit the locks
    that it holds.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._abandoned = False
        self._result: list[T] = []
        self._error: BaseException | None = None
        self.seconds = 0.0  # that the last task took

    @property
    def ended(self) -> bool:
        """Return whether the last task has ended."""
        return self._ended.is_set()

    def start(self, task: Callable[[Callable[[], None]], T], *, here: bool = False) -> None:
        """Start a task, once the one before has ended; `here` does it in this thread, now."""
        self._ended.clear()
        self._result, self._error, self._abandoned = [], None, False

        def work() -> None:
            began = time.perf_counter()
            try:
                self._result.append(task(self._pulse))
            except BaseException as error:
                self._error = error
            finally:
                self.seconds = time.perf_counter() - began
                self._ended.set()

        if here:
            work()
        else:
            thread = threading.Thread(target=_undisturbed, args=(work,), daemon=True)
            thread.start()

    def result(self, waiting: Callable[[], None] = lambda: None) -> T:
        """Wait for the task's end, and return its result or raise its error.

        `waiting` is called once if that takes more than some seconds.
        """
        if not self._ended.wait(_PATIENCE):
            waiting()
            self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._result[0]

    def abandon(self) -> bool:
        """Tell the task to stop if it does not end soon; return whether it has ended well."""
        if not self._ended.wait(_LEAVING):
            self._abandoned = True
            self._ended.wait(_LEAVING)
        return bool(self._result)

    def _pulse(self) -> None:
        if self._abandoned:
            raise AbandonedError


def _undisturbed(work: Callable[[], None]) -> None:
    # A signal that the system delivers to this thread would not wake the main one, which
    # handles it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    work()
