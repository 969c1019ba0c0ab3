"""How fast a run trains, what interrupts it left out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Steps and the seconds that they took, without those of looking and saving."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        """Count from this step and from now."""
        self._since, self._first = time.perf_counter(), step

    def rate(self, step: int, batch: int) -> float:
        """Images a second since the start."""
        seconds = time.perf_counter() - self._since
        return (step - self._first) * batch / max(seconds, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here takes no time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began
