"""Choose the number of CPU threads of a run: as set, as before a stop, or the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs
import torch

from e2ediff.data import Batch
from e2ediff.distributed.threads import Threads, former_threads
from e2ediff.train.recorder import Recorder


@attrs.define(eq=False)
class StepThreads:
    """Times a run's steps, and changes the number of threads if another is faster.

    `rehearse` computes a part of the next step without side effects. Without `choose` torch's
    number of threads stays.
    """

    rehearse: Callable[[Batch], object]
    recorder: Recorder
    choose: bool
    _threads: Threads | None = None
    _batch: Batch | None = None
    _began: float = 0.0

    def begin(self, batch: Batch) -> None:
        """Start timing a step on this batch; the first call sets the number of threads."""
        self._batch = batch
        if self._threads is None:
            self._threads = self._open()
        self._began = time.perf_counter()

    def done(self) -> None:
        """Record the end of a step that another step follows."""
        seconds = time.perf_counter() - self._began
        if self._threads is not None:
            with self.recorder.clock.paused():
                self._threads.done(1.0, seconds)

    def _open(self) -> Threads:
        recorder, at = self.recorder, self.recorder.position
        if recorder.device.type != "cpu":
            return Threads(self._attempt, self._report, fixed=True)
        former = [0, 0.0]
        if at.step > 0:
            former = recorder.world.on_leader(
                lambda: [*former_threads(recorder.directory, at.images)]
            )
        count, pace = int(former[0]), former[1]
        if not self.choose and count not in (0, now := torch.get_num_threads()):
            recorder.event("threads", count=now)
        threads = Threads(
            self._attempt,
            self._report,
            world=recorder.world,
            count=count,
            pace=pace / recorder.recipe.batch,
            fixed=not self.choose,
        )
        with recorder.clock.paused():
            threads.begin()
        return threads

    def _attempt(self) -> None:
        assert self._batch is not None
        self.rehearse(self._batch)

    def _report(self, line: str, count: int, of: int) -> None:
        self.recorder.report("threads", line, count=count, of=of)
