"""Show progress: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from e2ediff.distributed.signals import write_now
from e2ediff.terminal import echo, printable

if TYPE_CHECKING:
    from rich.live import Live

_SILENCE = 3.0  # seconds after which a user should see that work goes on


class Progress:
    """Progress of long work on stderr, so that stdout carries results alone.

    On a terminal one line is replaced in place; elsewhere (files, pipes, batch jobs) a plain
    line is written at most every `plain_seconds`, and at the end.
    """

    def __init__(self, stream: TextIO | None = None, plain_seconds: float = 10.0) -> None:
        self.stream = stream or sys.stderr
        self.plain_seconds = plain_seconds
        self._live: Live | None = None
        self._last = -1e9
        self._updated = time.monotonic()
        self._pending = ""
        self._rows = 1

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            # Imported here: it takes a quarter of a second, and only terminals need it.
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream, highlight=False)
            self._live = Live("", console=console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._pending:
            echo(self._pending, to=self.stream)

    def update(self, line: str) -> None:
        """Replace the progress line; an empty one removes it."""
        self._updated = now = time.monotonic()
        if not line and self._live is None:
            self._pending = ""
        elif self._live is not None:
            from rich.text import Text

            text, console = Text(printable(line)), self._live.console
            self._rows = len(text.wrap(console, console.width))
            self._live.update(text)  # wrapped, so that a narrow terminal shows all of it
            self._pending = line
        elif now - self._last >= self.plain_seconds:
            echo(line, to=self.stream)
            self._last, self._pending = now, ""
        else:
            self._pending = line

    @contextlib.contextmanager
    def doing(self, words: str) -> Iterator[None]:
        """Show what is done and for how long, whenever nothing else is shown for three seconds.

        For work in this process that cannot report how far it is.
        """
        done, began, shown = threading.Event(), time.monotonic(), threading.Event()

        def show() -> None:
            while not done.wait(_SILENCE / 4):
                if time.monotonic() - self._updated >= _SILENCE:
                    shown.set()
                    self.update(f"{words}: {duration(time.monotonic() - began)}")

        self._updated = began
        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if shown.is_set():
                self.update("")

    def interject(self, line: str) -> None:
        """Write a permanent line at once; may be called from a signal handler."""
        line = printable(line, lines=True)
        # The live line is redrawn over its rows, from the last one upwards.
        live = self._live is not None
        text = "\r\x1b[2K" + line + "\n" * (self._rows + 1) if live else f"{line}\n"
        write_now(self.stream, text)

    def say(self, line: str) -> None:
        """Write a permanent line."""
        if self._live is not None:
            self._live.console.print(printable(line, lines=True), markup=False, soft_wrap=True)
        else:
            echo(line, to=self.stream, lines=True)


def duration(seconds: float) -> str:
    """Format seconds as 2h05m, 3m20s or 12s."""
    s = round(seconds)
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def training_line(
    step: int, steps: int, rate: float, batch: int, losses: Mapping[str, float], health: str
) -> str:
    """Format a run's progress on one line: step, images/s, time left, latent health, losses."""
    left = duration((steps - step) * batch / rate) if rate > 0 else "?"
    shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
    return f"step {step}/{steps}  {rate:.0f} img/s  left {left}  {health}  {shown}"
