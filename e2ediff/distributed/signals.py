"""Handle Ctrl-C and termination: finish the step, save, exit; a second signal exits at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

from e2ediff.errors import E2EDiffError

SAVING = "stopping: finishing this step and saving; signal again to exit without saving"
BEFORE = "before training began"
UNSAVED = "a second time, without saving"
SAVED = "a second time, after saving"
_NOTHING = "stopping: there is nothing to save yet"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Those that ask a run to stop."""


class Stopped(KeyboardInterrupt):
    """The process exits at once, because it has nothing to save or got a second signal."""

    def __init__(self, number: int, when: str) -> None:
        self.number = number
        self.when = when
        verb = "interrupted" if number == signal.SIGINT else "terminated"
        super().__init__(f"{verb} {when}")

    @property
    def exit_code(self) -> int:
        """Return 130 after Ctrl-C, else 75, which means: run again with --resume."""
        return 130 if self.number == signal.SIGINT else 75


class Stop:
    """Records a request to stop and its signal, and acknowledges it at once.

    Inside `with`, signals are recorded, and the work checks `asked`. With `at_once` they raise
    `Stopped` until `defer` is called; a second signal always does.
    Signals within `grace` seconds of the first one are the same request, as the launcher may
    forward a signal that the scheduler already delivered.
    `words` is the answer to the first signal, `quiet` leaves it to another process, and `write`
    writes it to stderr.
    In a fork of the process, which may be a plugin's own, signals act as they did before.
    """

    def __init__(
        self,
        grace: float = 0.0,
        *,
        at_once: bool = False,
        words: str = SAVING,
        quiet: bool = False,
    ) -> None:
        self.signal: int | None = None
        self.grace = grace
        self.at_once = at_once
        self.words = words
        self.quiet = quiet
        self.write: Callable[[str], None] = lambda line: write_now(sys.stderr, f"{line}\n")
        self._since = 0.0
        self._old: dict[int, object] = {}
        self._process = 0

    @property
    def asked(self) -> bool:
        """Return whether a signal has come."""
        return self.signal is not None

    def defer(self) -> None:
        """Record signals from now on, because there is something to finish or save."""
        self.at_once = False

    def note(self, number: int) -> None:
        """Record a signal, of this process or of another one of the run, as a request to stop."""
        self.signal, self._since = number, time.monotonic()
        if not self.quiet:
            self.write(_NOTHING if self.at_once else self.words)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Restore the default handlers, for calls during which no Python handler can run."""
        self._restore()
        try:
            yield
        finally:
            self._install()

    def __enter__(self) -> Stop:
        self._install()
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _install(self) -> None:
        # Only the main thread may set handlers; in other threads they are left as they are.
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            for number in SIGNALS:
                self._old[number] = signal.signal(number, self._handle)

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)  # type: ignore[arg-type]
        self._old.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._restore()
            signal.raise_signal(number)
        elif self.asked:
            self._ask_again(number)
        else:
            self.note(number)
            if self.at_once:
                raise Stopped(number, BEFORE)

    def _ask_again(self, number: int) -> None:
        if time.monotonic() - self._since >= self.grace:
            signal.signal(number, signal.SIG_DFL)
            # The first one decides: a launcher may forward the second as another signal.
            raise Stopped(self.signal or number, UNSAVED)


def write_now(stream: TextIO, text: str) -> None:
    """Write past a stream's buffer, which the interrupted code may be filling."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
        try:
            file = stream.fileno()
        except (OSError, ValueError, AttributeError):  # a stream in memory
            stream.write(text)
        else:
            os.write(file, text.encode(errors="replace"))


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a command that ends with this error."""
    if isinstance(error, E2EDiffError | Stopped):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1
