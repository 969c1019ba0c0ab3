"""Ctrl-C and termination: finish the step, save, leave; a second one leaves at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType


class Stop:
    """Whether the run was asked to stop, and by which signal.

    Signals within `grace` seconds of the first one are the same request: a launcher hands on to
    its processes what a batch system has sent them as well.
    """

    def __init__(self, grace: float = 0.0) -> None:
        self.signal: int | None = None
        self.grace = grace
        self._since = 0.0
        self._old: dict[int, object] = {}

    @property
    def asked(self) -> bool:
        """True after the first signal."""
        return self.signal is not None

    def __enter__(self) -> Stop:
        # Only the main thread may set handlers; elsewhere (a notebook's worker) signals stay.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._since < self.grace:
            return
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.signal, self._since = number, time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)  # type: ignore[arg-type]
