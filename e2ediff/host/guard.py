"""The plugin boundary: run third-party code so that its failures stay its own."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from e2ediff.errors import PluginError
from e2ediff.terminal import echo

_GRACE = 0.5  # seconds after the limit until code that still hangs is reported


class Hung(BaseException):
    """A plugin exceeded its time limit; a BaseException, so that it does not swallow this."""


def time_limit() -> float:
    """Return the time limit for importing a plugin: E2EDIFF_PLUGIN_TIMEOUT, 10 s by default.

    Raises:
        PluginError: The variable is not a positive number.
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
    """Replaces stdout: forwards text to stderr, and keeps the first line."""

    def __init__(self) -> None:
        self.first = ""

    def write(self, text: str) -> int:
        """Write to the current stderr, as the former stdout may have been closed."""
        self.first = self.first or text.strip().partition("\n")[0][:80]
        echo(text, err=True, lines=True, end="")
        return len(text)

    def flush(self) -> None:
        """Flush stderr."""
        sys.stderr.flush()


@contextlib.contextmanager
def guarded(plugin: str) -> Iterator[StdoutToStderr]:
    """Run a plugin's code: stdout goes to stderr, and the time limit raises `Hung`.

    The limit works in the main thread, on systems with SIGALRM, for code that returns to the
    interpreter; it starts anew where torch is being imported.
    Code that does not return, such as a C function that waits, is reported on stderr, with the way
    to block the plugin.
    Garbage of others is collected afterwards: freeing it, such as the workers of an abandoned
    loader, may take seconds that are no fault of the plugin.
    """
    seconds, diverted = time_limit(), StdoutToStderr()
    watch = threading.Timer(seconds + _GRACE, _name_what_hangs, [plugin, seconds])
    watch.daemon = True
    watch.start()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with contextlib.redirect_stdout(diverted), _deadline(plugin, seconds):
            yield diverted
    finally:
        watch.cancel()
        if collecting:
            gc.enable()


def _hangs(plugin: str, seconds: float) -> str:
    return f"takes longer than {seconds:g} s; leave it out with E2EDIFF_BLOCK={plugin}"


def _imports_torch() -> bool:
    """Return whether torch is being imported, which takes long on a cold disk."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _name_what_hangs(plugin: str, seconds: float) -> None:
    if _imports_torch():
        return
    echo(f"plugin {plugin!r} {_hangs(plugin, seconds)}", err=True)


@contextlib.contextmanager
def _deadline(plugin: str, seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        if _imports_torch():  # no fault of the plugin that is the first to need it
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            return
        raise Hung(_hangs(plugin, seconds))

    started = time.monotonic()
    previous = signal.signal(signal.SIGALRM, ring) or signal.SIG_DFL
    # Repeat every second, in case the code swallows the first one.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left:  # restore the alarm of other code, such as a test runner
            rest = max(left - (time.monotonic() - started), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, rest, interval)


def cause(exc: BaseException) -> str:
    """Format an exception in one line: `ModuleNotFoundError: No module named 'x'`."""
    text = " ".join(str(exc).split())
    text = text if len(text) <= 300 else text[:300] + "..."
    return text if isinstance(exc, PluginError | Hung) else f"{type(exc).__name__}: {text}"
