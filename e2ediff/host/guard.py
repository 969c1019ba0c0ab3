"""The plugin boundary: a stranger's code runs, fails, and nobody else is hurt."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from e2ediff.errors import PluginError

_GRACE = 0.5  # seconds after which the limit has not ended what hangs


class Hung(BaseException):
    """A plugin took longer than it may; no `except Exception` of its own swallows this."""


def time_limit() -> float:
    """Seconds that a plugin may take to be imported: E2EDIFF_PLUGIN_TIMEOUT, by default 10.

    Raises:
        PluginError: The variable holds no positive number.
    """
    text = os.environ.get("E2EDIFF_PLUGIN_TIMEOUT", "10")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise PluginError(f"E2EDIFF_PLUGIN_TIMEOUT={text}: expected a number of seconds above 0")
    return seconds


class StdoutToStderr(io.TextIOBase):
    """Stands in for stdout: passes text on to stderr, and keeps the first line of it."""

    def __init__(self) -> None:
        self.first = ""

    def write(self, text: str) -> int:
        """To stderr, which is looked up now: what stdout was may have been closed since."""
        self.first = self.first or text.strip().partition("\n")[0][:80]
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Of stderr."""
        sys.stderr.flush()


@contextlib.contextmanager
def guarded(plugin: str) -> Iterator[StdoutToStderr]:
    """Run a plugin's code: stdout goes to stderr, and after the time limit it ends in `Hung`.

    The limit ends code in the main thread of a system with SIGALRM that comes back to the
    interpreter.
    Code that does not come back, as a C function that waits, is named on stderr, with the way to
    leave the plugin out.
    """
    seconds, diverted = time_limit(), StdoutToStderr()
    watch = threading.Timer(seconds + _GRACE, _name_what_hangs, [plugin, seconds])
    watch.daemon = True
    watch.start()
    try:
        with contextlib.redirect_stdout(diverted), _deadline(plugin, seconds):
            yield diverted
    finally:
        watch.cancel()


def _hangs(plugin: str, seconds: float) -> str:
    return f"takes longer than {seconds:g} s; leave it out with E2EDIFF_BLOCK={plugin}"


def _name_what_hangs(plugin: str, seconds: float) -> None:
    sys.stderr.write(f"plugin {plugin!r} {_hangs(plugin, seconds)}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _deadline(plugin: str, seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hung(_hangs(plugin, seconds))

    started = time.monotonic()
    previous = signal.signal(signal.SIGALRM, ring) or signal.SIG_DFL
    # Rings again every second, in case that code swallows the first.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left:  # somebody else's alarm, such as a test runner's
            rest = max(left - (time.monotonic() - started), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, rest, interval)


def cause(exc: BaseException) -> str:
    """An exception in one line: `ModuleNotFoundError: No module named 'x'`."""
    text = " ".join(str(exc).split())
    text = text if len(text) <= 300 else text[:300] + "..."
    return text if isinstance(exc, PluginError | Hung) else f"{type(exc).__name__}: {text}"
