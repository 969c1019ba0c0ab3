"""Handle Ctrl-C and termination: finish the step, save, exit; a second signal exits at once.

Imports the standard library alone, because the command line does this first of all.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TextIO

SAVING = "stopping: finishing this step and saving; signal again to exit without saving"
BEFORE = "before training began"
UNSAVED = "a second time, without saving"
SAVED = "a second time, after saving"
_NOTHING = "stopping: there is nothing to save yet"
_CHANCE = 0.3  # seconds for the main thread to answer, if it can
_AGAIN = 0.01  # seconds until an error that was discarded is raised again
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Those that ask a run to stop."""


class Stopped(KeyboardInterrupt):
    """The process exits at once, because it has nothing to save or got a second signal.

    `kept` says what is kept, and `command` is the one that continues; "" until they are known.
    """

    def __init__(self, number: int, when: str) -> None:
        self.number = number
        self.when = when
        self.command = self.kept = ""
        verb = "interrupted" if number == signal.SIGINT else "terminated"
        super().__init__(f"{verb} {when}".rstrip())

    def __str__(self) -> str:
        kept = f"; {self.kept}" if self.kept else ""
        again = f"\ncontinue with: {self.command}" if self.command else ""
        return f"{super().__str__()}{kept}{again}"

    def repeat(self, words: Sequence[str]) -> Stopped:
        """Complete the text for a command with these words, which may be repeated."""
        if not self.when:
            self.kept = self.kept or "what was there is kept"
        self.command = self.command or shlex.join(["e2ediff", *words])
        return self

    @property
    def exit_code(self) -> int:
        """Return 130 after Ctrl-C, else 75, which means: repeat, or for a run resume."""
        return 130 if self.number == signal.SIGINT else 75


class Stop:
    """Records a request to stop and its signal, and acknowledges it at once.

    Inside `with`, signals are recorded, and the work checks `asked`. With `at_once` they raise
    `Stopped` until `defer` is called; a second signal always does.
    Signals within `grace` seconds of the first one are the same request, as the launcher may
    forward a signal that the scheduler already delivered.
    `when` is the end of that error's text.
    `words` is the answer to the first signal, `quiet` leaves it to another process, and `write`
    writes it to stderr.
    In a fork of the process, which may be a plugin's own, signals act as they did before.
    """

    def __init__(
        self,
        grace: float = 0.0,
        *,
        at_once: bool = False,
        when: str = BEFORE,
        words: str = SAVING,
        quiet: bool = False,
    ) -> None:
        self.signal: int | None = None
        self.grace = grace
        self.at_once = at_once
        self.when = when
        self.words = words
        self.quiet = quiet
        self.write: Callable[[str], None] = lambda line: write_now(sys.stderr, f"{line}\n")
        self._since = 0.0
        self._old: dict[int, object] = {}
        self._hook = sys.unraisablehook
        self._discarded: Stopped | None = None
        self._process = 0
        self._over = self._discarding = False

    @property
    def asked(self) -> bool:
        """Return whether a signal has come."""
        return self.signal is not None

    def defer(self) -> None:
        """Record signals from now on, because there is something to finish or save."""
        self.at_once = False

    def finish(self) -> None:
        """Ignore signals from now on, because how the work ended is being recorded."""
        self._over = True

    def note(self, number: int) -> None:
        """Record a signal, of this process or of another one of the run, as a request to stop."""
        self.signal, self._since = number, time.monotonic()
        if not self.quiet:
            self.write(_NOTHING if self.at_once else self.words)

    @contextlib.contextmanager
    def by_thread(self) -> Iterator[None]:
        """Answer signals from a thread if the main thread does not, and end the process.

        For calls during which no Python handler can run, and which leave nothing to save.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        thread = threading.Thread(target=self._answer, args=(reader,), daemon=True)
        thread.start()
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.write(writer, b"\0")
            thread.join()
            os.close(reader)
            os.close(writer)

    def _answer(self, reader: int) -> None:
        """Wait for the number of a signal; 0 ends that."""
        while number := os.read(reader, 1)[0]:
            if number not in SIGNALS:
                continue
            time.sleep(_CHANCE)
            if self.asked:
                return  # the main thread does it
            error = Stopped(number, self.when)
            self.note(number)
            if not self.quiet:
                self.write(str(error))
            os._exit(error.exit_code)

    def __enter__(self) -> Stop:
        self._install()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        late, self._discarded = self._discarded, None
        self._restore()
        if late and kind is None:  # what was to be raised again soon
            raise late

    def _install(self) -> None:
        # Only the main thread may set handlers; in other threads they are left as they are.
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            for number in SIGNALS:
                self._old[number] = signal.signal(number, self._handle)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable

    def _restore(self) -> None:
        if self._old:
            sys.unraisablehook = self._hook
        for number, old in self._old.items():
            signal.signal(number, old)  # type: ignore[arg-type]
        self._old.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._restore()
            if signal.getsignal(number) == self._handle:  # forked while it was being set
                signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self._over:
            pass
        elif error := self._discarded:
            if not self._discarding:
                self._discarded = None
                raise error
        elif self.asked:
            self._ask_again(number)
        else:
            self.note(number)
            if self.at_once:
                raise Stopped(number, self.when)

    def _unraisable(self, found: sys.UnraisableHookArgs) -> None:
        """Raise `Stopped` again, which Python discards where a finalizer or callback ran."""
        error = found.exc_value
        if not isinstance(error, Stopped):
            self._hook(found)
            return
        self._discarding = True  # what is raised in this function is discarded again
        again = self._discarded = Stopped(error.number, error.when)
        signal.signal(error.number, self._handle)  # a second one has set it back
        # The main thread may be waiting by then. A thread of `threading` would be waited for here.
        _thread.start_new_thread(self._repeat, (threading.get_ident(), again))
        self._discarding = False

    def _repeat(self, thread: int, error: Stopped) -> None:
        """Send a signal to a thread until it raises this error."""
        time.sleep(_AGAIN)
        while self._discarded is error:
            signal.pthread_kill(thread, error.number)
            time.sleep(_AGAIN)

    def _ask_again(self, number: int) -> None:
        if time.monotonic() - self._since >= self.grace:
            signal.signal(number, signal.SIG_DFL)
            # The first one decides: a launcher may forward the second as another signal.
            raise Stopped(self.signal or number, UNSAVED)


@contextlib.contextmanager
def keeping(what: str) -> Iterator[None]:
    """Add to the error of a signal, in its text, what is kept; for commands that can be repeated.

    May decorate a function.
    """
    try:
        yield
    except Stopped as error:
        error.kept = what
        raise


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Hold back the signals that ask to stop; processes started inside begin with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    from e2ediff.errors import E2EDiffError  # nothing is imported before signals are answered

    if isinstance(error, E2EDiffError | Stopped):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1
