"""Measure training throughput, excluding pauses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Counts steps and the seconds they took, without diagnoses and saving."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        """Start counting at this step, now."""
        self._since, self._first = time.perf_counter(), step

    def rate(self, step: int, batch: int) -> float:
        """Return images per second since the start."""
        seconds = time.perf_counter() - self._since
        return (step - self._first) * batch / max(seconds, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began
