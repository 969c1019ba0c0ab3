"""The training loop, which knows no loss by name.

The objective decides what is learned, from what, and where gradients stop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import attrs
import torch
from torch import Tensor

from e2ediff.data import Batch, DataSource
from e2ediff.distributed.signals import Stop
from e2ediff.distributed.world import World
from e2ediff.errors import CollapseError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.loading.bad_images import Skipped, newly_skipped
from e2ediff.loading.batches import batches
from e2ediff.monitor.alarm import CollapseDetector
from e2ediff.monitor.monitor import Monitor
from e2ediff.step.assembly import Assembly, assemble
from e2ediff.step.update import Update
from e2ediff.store.run_directory import RunDirectory, State
from e2ediff.train.bad_steps import BadSteps, RewindError
from e2ediff.train.compilation import StepCompilation
from e2ediff.train.continuation import continue_command, describe
from e2ediff.train.cpu_threads import StepThreads
from e2ediff.train.measurements import Measurements
from e2ediff.train.progress import Progress
from e2ediff.train.recorder import Recorder
from e2ediff.train.saving import Saver

FIRST_SAVE = 60.0
"""Seconds of training after which a run without a checkpoint saves, whatever its cadence."""


@attrs.frozen(eq=False)
class Prepared:
    """What a run needs besides its directory: what it trains, and what measures that."""

    parts: Assembly
    monitor: Monitor

    @classmethod
    def build(
        cls,
        host: Host,
        recipe: Recipe,
        sources: tuple[DataSource, DataSource],
        device: torch.device,
        world: World,
        kernels: Mapping[str, str] | None = None,
    ) -> Self:
        """Build the networks, and read the images on which they are measured.

        `kernels` are those of a run that goes on, as its checkpoint records them.

        Raises:
            DataError, ResourceError: A file, a package or memory for it is missing.
        """
        parts = assemble(recipe, device, world, kernels)
        return cls(parts, Monitor.open(host, recipe, parts, world, sources, device))


class Engine:
    """One run: builds everything from a recipe, trains, and does what is due after each step."""

    def __init__(
        self,
        host: Host,
        recipe: Recipe,
        directory: RunDirectory,
        device: torch.device,
        sources: tuple[DataSource, DataSource],
        progress: Progress,
        world: World | None = None,
        *,
        choose_threads: bool = False,
        prepared: Prepared | None = None,
    ) -> None:
        """Build what the recipe asks for, unless it is `prepared`.

        `choose_threads` is as for `train`.
        """
        self.host = host
        self.recipe = recipe
        self.directory = directory
        self.device = device
        self.progress = progress
        self.world = world = world or World()
        self.source = sources[0]
        prepared = prepared or Prepared.build(host, recipe, sources, device, world)
        self.parts: Assembly = prepared.parts
        self.recorder = recorder = Recorder(host, recipe, directory, device, progress, world)
        self.position = recorder.position
        self.compilation = StepCompilation(recipe, self.parts, recorder, self._rehearse)
        self.update = Update(recipe, self.parts, world, recorder.report, self.compilation.gives_up)
        self.monitor = prepared.monitor
        self.detector = detector = CollapseDetector(recipe.alarm, self.monitor.observer.figures)
        recorder.skipped([bad for source in sources for bad in newly_skipped(source)])
        self.measurements = Measurements(recipe, self.monitor, detector, recorder)
        images, data = self.monitor.observer.calibration, describe(sources)
        self.bad_steps = BadSteps(recipe, recorder, self.update.guard, self.source)
        self.saver = Saver(recipe, self.parts, detector, recorder, images, data, self.bad_steps)
        self._overdue = False  # whether a save waits for a step that makes an update
        self.threads = StepThreads(self._rehearse, recorder, choose=choose_threads)
        self.began = time.monotonic()

    def run(self, stop: Stop) -> None:
        """Train from the current position to the end, or until `stop` is requested.

        Raises:
            DivergedError: A loss or gradient is not finite, and the guards end the run.
            CollapseError: The alarm ended the run.
            DataError, ResourceError: The data cannot be read, or the disk refuses.
        """
        r, recorder, error = self.recipe, self.recorder, None
        self.began = time.monotonic()
        recorder.trackers.open()
        recorder.notify("run_started")
        self.set_status("running")
        try:
            self._obey_alarm()
            already_done = self.position.step >= r.total_steps
            if already_done:
                self._end_again()
            if self.position.step == 0:
                self._diagnose()
            if self.saver.anchored and self.detector.anchor is None:
                self.saver.save()
            while not (already_done or self._asked(stop) or self._train(stop)):
                pass
            if not self.saver.is_begun:
                self.saver.begin()
            self.saver.finish()
            self.measurements.draw_curves()
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.saver.close(error)
            recorder.trackers.close()
            recorder.notify("run_ended", error=error)

    def _train(self, stop: Stop) -> bool:
        """Take the remaining steps; return False if the run was rolled back instead."""
        at, r = self.position, self.recipe
        self.recorder.clock.start(at.step)
        self.saver.finish()  # processes that read images are forked, which a thread must not see
        self.saver.staging.settle()
        try:
            for batch in self._batches():
                self.threads.begin(batch)
                self.compilation.begin(batch)
                known = at.step + 1 in self.bad_steps.known
                record = self.update(batch, at.images, self._attempt, skip=known)
                at.step, at.images = at.step + 1, at.images + r.batch
                self.compilation.done()
                busy = self.saver.in_flight or self.saver.staging.touching
                if at.step < r.total_steps and not busy:
                    self.threads.done()
                self._after_step(record)
                if self._asked(stop):
                    self.bad_steps.settle()
                    break
        except RewindError as error:
            self.saver.go_back(str(error))
            return False
        except CollapseError:
            if self.detector.may_return:
                self._return_by_alarm()
                return False
            self.saver.save()
            self.measurements.draw_curves()
            raise
        return True

    def _after_step(self, record: Mapping[str, Tensor | float]) -> None:
        """Do what is due after a step; `record` has this process's share of the figures."""
        r, step, monitor = self.recipe, self.position.step, self.monitor
        last = step == r.total_steps
        log, diagnose = step % r.cadence.log == 0 or last, monitor.due(step)
        due = step % r.cadence.checkpoint == 0 or self._overdue or self._first_save_due()
        if self.update.guard.waits or log or diagnose or due:
            self.bad_steps.settle()
        if log:
            self.measurements.log(record, skipped=self.bad_steps.is_last)
        self.recorder.notify("step_ended", step=step)
        if diagnose:
            self._diagnose()
        if monitor.preview_due(step):
            self.measurements.preview()
        if monitor.scores_due(step):
            self.measurements.score()
        self.saver.prepare()
        # Weights after which a step was bad may be what is wrong: they replace no checkpoint.
        self._overdue = due and self.bad_steps.is_last
        if due and not last and not self._overdue:
            self.saver.begin()
        if r.snapshot_steps and step % r.snapshot_steps == 0 and not last:
            self.saver.snapshot()

    def _first_save_due(self) -> bool:
        """Return whether the run has trained for a minute and has no checkpoint, in any process.

        The first process decides, by its clock: a save takes part in all of them.
        """
        if self.saver.has_begun:
            return False
        late = self.world.is_leader and time.monotonic() - self.began >= FIRST_SAVE
        return bool(self.world.highest(int(late)))

    def _diagnose(self) -> None:
        phases = self.update.phases(self.position.images)
        self.measurements.diagnose(phases or self.recipe.objective.phases[-1:])

    def _rehearse(self, batch: Batch, compiled: bool = False) -> float:
        return self.update.rehearse(batch, self.position.images, self._attempt, compiled=compiled)

    @property
    def _attempt(self) -> int:
        """Return the number of rollbacks so far, by the alarm and by the guards."""
        return self.detector.attempt + self.bad_steps.returns

    def _return_by_alarm(self) -> None:
        self.detector.attempt += 1
        rollback = f"rollback {self.detector.attempt} of at most {self.recipe.alarm.attempts}"
        self.saver.go_back(rollback)

    def _batches(self) -> Iterator[Batch]:
        """Yield this process's rows of every batch from the current position on."""
        r = self.recipe
        return batches(
            self.source,
            r.data.image,
            batch=r.batch,
            seed=r.seed,
            first=self.position.step,
            last=r.total_steps,
            flip=r.data.flip,
            workers=r.data.workers,
            device=self.device,
            sampling=r.data.sampling,
            report=self._skipped,
            rows=self.update.rows,
            microshards=r.microshards,
        )

    def _skipped(self, found: Sequence[Skipped], seen: int) -> None:
        """List damaged images of a batch, and end the run where they are too many."""
        self.recorder.skipped(found, seen)
        fraction = self.recipe.data.max_bad_fraction
        self.recorder.bad_images.refuse_too_many(fraction, seen, len(self.source))

    def _asked(self, stop: Stop) -> bool:
        """Return whether any process was asked to stop, so that all stop after the same step.

        Raises:
            DivergedError, ResourceError: A save has failed since the last step.
        """
        self.saver.poll()
        agreed = self.world.highest(stop.signal or 0)
        if agreed:  # a signal that came while the processes agreed counts next time
            if not stop.asked:
                stop.note(agreed)
            stop.signal = agreed
        return bool(agreed)

    def _obey_alarm(self) -> None:
        """Take no step of a run whose latents were collapsed when it ended, unless it may warn.

        A run whose alarm has other bounds than then is judged anew; one that may roll back does.

        Raises:
            CollapseError: The policy says so.
        """
        detector = self.detector
        if not detector.on or self.recipe.alarm.policy == "warn":
            return
        if detector.retuned:
            detector.on, detector.since = False, None
            self._diagnose()
        elif detector.may_return:
            self._return_by_alarm()
        else:
            step, last = self.position.step, self.position.step >= self.recipe.total_steps
            regardless = continue_command(self.directory.path, "alarm.policy=warn")
            raise CollapseError(
                f"step {step}{', the last one' * last}: the latents have collapsed. "
                f"{detector.advice(regardless)}"
            )

    def _end_again(self) -> None:
        """Make the last preview and scores of a finished run, if a stop prevented that."""
        step = self.position.step
        if not self.directory.store.exists(f"samples/step-{step:08d}.png"):
            self.measurements.preview()
            if self.monitor.scores_due(step):
                self.measurements.score()

    def set_status(self, state: State, code: int | None = None, reason: str = "") -> None:
        """Replace `status.json` by the current status."""
        self.recorder.status(state, self.detector.collapsed, code, reason)
