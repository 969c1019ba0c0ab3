"""Write and restore checkpoints and snapshots of a run, and roll back after a collapse."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import attrs
from torch import Tensor

from e2ediff.errors import DivergedError
from e2ediff.host.recipe import Recipe
from e2ediff.monitor.alarm import CollapseDetector
from e2ediff.step.assembly import Assembly
from e2ediff.step.compiling import uncompiled
from e2ediff.store.checkpoint import checkpoint_at, drop_after, open_checkpoint, save
from e2ediff.store.manifest import Checkpoint
from e2ediff.store.storage import JSON, Store
from e2ediff.train.recorder import Recorder
from e2ediff.train.snapshot import put_back, snapshots, take, take_snapshot


@attrs.define(eq=False)
class Saver:
    """Writes a run's state to its directory, and restores it.

    `calibration` (M, C, H, W) are the training images from which statistics are taken, and `data`
    is the description of the data that checkpoints carry.
    """

    recipe: Recipe
    parts: Assembly
    detector: CollapseDetector
    recorder: Recorder
    calibration: Tensor
    data: JSON
    _saved_at: int = -1

    @property
    def is_saved(self) -> bool:
        """Return whether the newest checkpoint holds the current position."""
        return self._saved_at == self.recorder.position.images

    def save(self) -> None:
        """Write a checkpoint, with norm statistics calibrated for every set of weights."""
        at, detector, recorder = self.recorder.position, self.detector, self.recorder
        with self.recorder.clock.paused():
            regular = at.step % self.recipe.cadence.checkpoint == 0 or detector.anchor is None
            if self.recipe.alarm.policy == "rollback" and regular and detector.clean:
                detector.anchor = at.images
            with uncompiled(self.recipe):
                held = take(self.parts, self.calibration, keep=self.recorder.world.is_leader)
            state = {**held.state, "alarm": detector.state(), "data": self.data}
            store, keep = recorder.directory.store, self.recipe.checkpoint.keep
            recorder.last_checkpoint = self._write(store, held.files, state, keep, detector.anchor)
            self._saved_at = at.images
            recorder.event("saved", name=recorder.last_checkpoint)
            recorder.status("running", detector.collapsed)
            recorder.notify("checkpoint_saved", path=recorder.last_checkpoint)

    def snapshot(self) -> None:
        """Store the averages from which other widths are reconstructed."""
        post_hoc, recorder = self.recipe.post_hoc, self.recorder
        assert post_hoc is not None
        with recorder.clock.paused():
            files = take_snapshot(self.parts, self.recipe, keep=recorder.world.is_leader)
            self._write(snapshots(recorder.directory.store), files, {}, post_hoc.keep)

    def _write(
        self,
        store: Store,
        files: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, JSON],
        keep: int,
        spare: int | None = None,
    ) -> str:
        """Save at the run's position, in the first process; return the name in all of them."""
        at, recorder = self.recorder.position, self.recorder
        write = partial(save, store, at.images, at.step, files, state, keep, spare=spare)
        try:
            return recorder.world.on_leader(partial(write, warn=recorder.progress.say))
        except DivergedError as error:
            raise recorder.diverged(str(error)) from error

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: Its tensors do not fit the recipe.
        """
        at = self.recorder.position
        put_back(self.parts, checkpoint, self.recorder.device)
        at.step, at.images = checkpoint.step, checkpoint.images
        self.recorder.last_checkpoint, self._saved_at = checkpoint.name, checkpoint.images
        self.detector.restore(checkpoint.state.get("alarm", {}))
        self.rewind(at.images)

    def rewind(self, images: int) -> None:
        """Drop figures and snapshots after this many images, as they will be recomputed."""
        self.recorder.directory.rewind(images)
        if self.recipe.post_hoc and self.recorder.world.is_leader:
            store = snapshots(self.recorder.directory.store)
            drop_after(store, images, self.recorder.progress.say)

    def go_back(self) -> None:
        """Roll back to the checkpoint before the first sign of collapse, and draw other noise.

        Raises:
            CheckpointError: It is damaged or was removed.
        """
        directory, at = self.recorder.directory, self.recorder.position
        step, images, attempt = at.step, at.images, self.detector.attempt + 1
        anchor = checkpoint_at(directory.store, self.detector.anchor or 0)
        # A run cannot choose a checkpoint: it can only continue from the newest one.
        found = open_checkpoint(directory.store, anchor, use="continue with --resume")
        kept = directory.set_aside(found.images, found.step)
        self.restore(found)
        self.detector.attempt = attempt
        self.recorder.event(
            "rewound", step=step, images=images, to=found.name, attempt=attempt, kept=kept
        )
        self.recorder.progress.say(
            f"step {step}: rolled back to step {at.step} ({found.name}), to continue with other "
            f"noise; rollback {attempt} of at most {self.recipe.alarm.attempts}. What was "
            f"recorded since is kept in {directory.store.where(kept)}"
        )
        # Save at once, so that a crash does not undo the rollback; later ones are set aside.
        self.save()
