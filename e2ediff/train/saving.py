"""Write and restore checkpoints and snapshots of a run, and roll back after a collapse."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import attrs
from torch import Tensor

from e2ediff.distributed.background import Background
from e2ediff.errors import DivergedError, E2EDiffError
from e2ediff.host.recipe import Recipe
from e2ediff.monitor.alarm import CollapseDetector
from e2ediff.step.assembly import Assembly
from e2ediff.store.checkpoint import (
    checkpoint_at,
    checkpoint_name,
    drop_after,
    open_checkpoint,
    save,
)
from e2ediff.store.manifest import Checkpoint, plain
from e2ediff.store.records import COMMITTED, STAGED
from e2ediff.store.storage import JSON
from e2ediff.train.bad_steps import BadSteps
from e2ediff.train.recorder import Recorder
from e2ediff.train.snapshot import put_back, snapshots, take, take_snapshot, tensors_of
from e2ediff.train.staging import Staging

_UNTIMED = 3  # the first step whose time decides nothing


@attrs.frozen
class _Save:
    """A save in flight: the run's position when it began, and the seconds training waited for it.

    `name` is that of the checkpoint, None for a snapshot.
    """

    step: int
    images: int
    name: str | None
    paused: float


@attrs.define(eq=False)
class Saver:
    """Writes a run's state to its directory, and restores it.

    `calibration` (M, C, H, W) are the training images from which statistics are taken, and `data`
    is the description of the data that checkpoints carry.

    A save copies the state, and a thread of the first process writes it while training goes on;
    at most one is in flight. Its end is recorded between two steps by the thread that trains, in
    `poll`, `finish` or the next save, and then plugins are notified of it. The properties
    `is_begun`, `has_begun` and `in_flight` are the same in all processes.
    """

    recipe: Recipe
    parts: Assembly
    detector: CollapseDetector
    recorder: Recorder
    calibration: Tensor
    data: JSON
    bad_steps: BadSteps
    staging: Staging = attrs.field(factory=Staging)
    _writer: Background[str] = attrs.field(factory=Background, init=False)
    _flight: _Save | None = attrs.field(default=None, init=False)
    _warnings: list[str] = attrs.field(factory=list, init=False)
    _told: bool = attrs.field(default=False, init=False)
    _steps: int = attrs.field(default=0, init=False)
    _begun_at: int = attrs.field(default=-1, init=False)
    _saved_at: int = attrs.field(default=-1, init=False)

    def __attrs_post_init__(self) -> None:
        # An error names the last checkpoint, which may be in flight.
        self.recorder.settle_save = partial(self.close, None)

    @property
    def is_saved(self) -> bool:
        """Return whether the newest complete checkpoint holds the current position."""
        return self._saved_at == self.recorder.position.images

    @property
    def is_begun(self) -> bool:
        """Return whether the newest checkpoint, complete or in flight, is of this position."""
        return self._begun_at == self.recorder.position.images

    @property
    def has_begun(self) -> bool:
        """Return whether there is a checkpoint, complete or in flight."""
        return self._begun_at >= 0

    @property
    def in_flight(self) -> bool:
        """Return whether a save is in flight."""
        return self._flight is not None

    @property
    def _alarm_returns(self) -> bool:
        return self.recipe.alarm.policy == "rollback"

    @property
    def anchored(self) -> bool:
        """Return whether the run may go back to a checkpoint, which is then its anchor."""
        return self._alarm_returns or self.recipe.guards.rewinds

    def save(self) -> None:
        """Write a checkpoint of the current position, and wait until it is complete.

        Raises:
            DivergedError: A tensor is not finite. Nothing was written.
            ResourceError: The disk or store refused. The older checkpoints are intact.
        """
        self.begin()
        self.finish()

    def prepare(self) -> None:
        """Have the memory of the first save provided meanwhile; call after each step.

        Not in the first ones, which may be timed, nor where other processes would wait.
        """
        self._steps += 1
        if self._steps == _UNTIMED and not self.staging.size and self.recorder.world.size == 1:
            self.staging.prepare(tensors_of(self.parts)[0])

    def begin(self) -> None:
        """Begin to write a checkpoint, with norm statistics calibrated for every set of weights.

        Raises:
            DivergedError, ResourceError: The save before failed.
        """
        self.finish()
        at, detector, recorder = self.recorder.position, self.detector, self.recorder
        with self.recorder.clock.paused():
            began = time.perf_counter()
            # Weights after which a step was bad may be what is wrong: a run that is stopped there
            # saves them, and does not return to them.
            due = at.step % self.recipe.cadence.checkpoint == 0 and not self.bad_steps.is_last
            regular = due or detector.anchor is None
            if self.anchored and regular and (detector.clean or not self._alarm_returns):
                detector.anchor = at.images
            with self.parts.compilation.disabled():
                leads = recorder.world.is_leader
                held = take(self.parts, self.calibration, self.staging, keep=leads)
            state = {**held.state, "alarm": detector.state(), "data": self.data}
            state["guards"] = self.bad_steps.state()
            self._begun_at = at.images
            self._start(checkpoint_name(at.images), held.files, state, began)

    def snapshot(self) -> None:
        """Begin to store the averages from which other widths are reconstructed.

        Raises:
            DivergedError, ResourceError: The save before failed.
        """
        self.finish()
        with self.recorder.clock.paused():
            began = time.perf_counter()
            files = take_snapshot(self.parts, self.recipe, keep=self.recorder.world.is_leader)
            self._start(None, files, {}, began)

    def _start(
        self,
        name: str | None,
        files: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, JSON],
        began: float,
    ) -> None:
        """Begin to write, in a thread of the first process; at once if there is no copy."""
        at, recorder, post_hoc = self.recorder.position, self.recorder, self.recipe.post_hoc
        store, keep = recorder.directory.store, self.recipe.checkpoint.keep
        spare = self.detector.anchor
        in_place = name is not None and not self.staging.fits
        if name is None:
            assert post_hoc is not None
            store, keep, spare = snapshots(store), post_hoc.keep, None
        plain_state = {key: plain(value, key) for key, value in state.items()}  # a copy
        write = partial(
            save, store, at.images, at.step, files, plain_state, keep, self._warnings.append, spare
        )

        def task(pulse: Callable[[], None]) -> str:
            self.staging.wait()
            return write(pulse=pulse)

        recorder.directory.store.flush()  # figures up to here are safe before the checkpoint is
        if recorder.world.is_leader:
            self._writer.start(task, here=in_place)
        paused = time.perf_counter() - began
        self._flight = _Save(at.step, at.images, name, paused)
        if in_place and not self._told:
            self._told = True
            text = (
                "checkpoints are written while training waits, as a copy of "
                f"{self.staging.size:,} bytes does not fit into free memory"
            )
            recorder.report("saving_in_place", text)
        elif name is not None and not in_place:
            recorder.event(STAGED, name=name, paused=round(paused, 4))

    def poll(self) -> None:
        """Record the save in flight if it has ended; a collective call while there is one.

        Raises:
            DivergedError, ResourceError: It failed, as for `finish`.
        """
        if self._flight and self.recorder.world.highest(int(self._writer.ended)):
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one, and record it; a collective call.

        Raises:
            DivergedError: A tensor is not finite. Nothing was written.
            ResourceError: The disk or store refused. The older checkpoints are intact.
        """
        flight, recorder, began = self._flight, self.recorder, time.perf_counter()
        if flight is None:
            return
        with recorder.clock.paused():
            try:
                name = recorder.world.on_leader(partial(self._writer.result, self._waiting))
            except E2EDiffError as error:
                self._flight = None
                if isinstance(error, DivergedError):
                    raise recorder.diverged(str(error), flight.step) from error
                raise
            self._record(name, flight, time.perf_counter() - began)

    def close(self, error: BaseException | None) -> None:
        """Settle the save in flight as the run ends with this error; no collective call.

        A second signal abandons it, unless it is complete. After other errors it is waited for.
        """
        flight, recorder = self._flight, self.recorder
        self.staging.abandon()
        if flight is None or not recorder.world.is_leader:
            return
        if isinstance(error, KeyboardInterrupt) and not self._writer.abandon():
            return
        try:
            self._record(self._writer.result(self._waiting), flight, 0.0)
        except KeyboardInterrupt:
            self._writer.abandon()
            raise
        except Exception as failed:  # the first error is the one to report
            recorder.progress.say(f"the save of step {flight.step} failed too: {failed}")

    def _waiting(self) -> None:
        step = self._flight.step if self._flight else 0
        self.recorder.progress.say(f"waiting until the save of step {step} is written")

    def _record(self, name: str, flight: _Save, waited: float) -> None:
        """Record that a save is complete, and notify plugins."""
        self._flight = None
        self.staging.release()
        recorder = self.recorder
        while self._warnings:
            recorder.progress.say(self._warnings.pop(0))
        if flight.name is None:
            return
        recorder.last_checkpoint, self._saved_at = name, flight.images
        recorder.event(
            COMMITTED,
            step=flight.step,
            images=flight.images,
            name=name,
            seconds=round(self._writer.seconds, 4),
            paused=round(flight.paused + waited, 4),
        )
        recorder.status("running", self.detector.collapsed)
        recorder.notify("checkpoint_saved", path=name)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: Its tensors do not fit the recipe.
        """
        at = self.recorder.position
        if checkpoint.step * self.recipe.batch != checkpoint.images:
            raise checkpoint.damaged(
                f"step {checkpoint.step} in batches of {self.recipe.batch} makes "
                f"{checkpoint.step * self.recipe.batch} images, and it counts {checkpoint.images}"
            )
        put_back(self.parts, checkpoint, self.recorder.device, self.recipe)
        at.step, at.images = checkpoint.step, checkpoint.images
        self.recorder.last_checkpoint = checkpoint.name
        self._begun_at = self._saved_at = checkpoint.images
        checkpoint.read("alarm", self.detector.restore)
        checkpoint.read("guards", self.bad_steps.restore)
        self.rewind(at.images)

    def rewind(self, images: int) -> None:
        """Drop figures and snapshots after this many images, as they will be recomputed."""
        self.recorder.directory.rewind(images)
        if self.recipe.post_hoc and self.recorder.world.is_leader:
            store = snapshots(self.recorder.directory.store)
            drop_after(store, images, self.recorder.progress.say)

    def go_back(self, rollback: str) -> None:
        """Roll back to the last regular checkpoint, and draw other noise.

        If the alarm may return, to the one before the first sign of collapse. Whoever asks for it
        has counted it, and names it by `rollback`.

        Raises:
            CheckpointError: It is damaged or was removed.
            DivergedError, ResourceError: It could not be saved.
        """
        self.finish()
        directory, at = self.recorder.directory, self.recorder.position
        step, images, rollbacks = at.step, at.images, self.detector.attempt
        anchor = checkpoint_at(directory.store, self.detector.anchor or 0)
        # A run cannot choose a checkpoint: it can only continue from the newest one.
        found = open_checkpoint(directory.store, anchor, use="continue with --resume")
        kept = directory.set_aside(found.images, found.step)
        with self.bad_steps.remembered():
            self.restore(found)
        self.detector.attempt = rollbacks
        attempt = rollbacks + self.bad_steps.returns
        self.recorder.event(
            "rewound", step=step, images=images, to=found.name, attempt=attempt, kept=kept
        )
        since = (
            f" What was recorded since is kept in {directory.store.where(kept)}" if kept else ""
        )
        self.recorder.progress.say(
            f"step {step}: rolled back to step {at.step} ({found.name}), to continue with other "
            f"noise; {rollback}.{since}"
        )
        # Save at once, so that a crash does not undo the rollback; later ones are set aside.
        self.save()
