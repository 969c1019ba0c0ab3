"""The training loop: machinery without science.

What is learned, from what, and where gradients stop, is the objective's; the engine never
learns a loss's name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from e2ediff.data import Batch, DataSource
from e2ediff.distributed.signals import Stop
from e2ediff.distributed.threads import Threads, former_threads
from e2ediff.distributed.world import World
from e2ediff.errors import CollapseError, DivergedError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.loading.bad_images import BAD_IMAGES, BadImages, Skipped, taken
from e2ediff.loading.batches import batches
from e2ediff.monitor.alarm import Watch
from e2ediff.monitor.monitor import Monitor
from e2ediff.monitor.pictures import curves_png, grid_png
from e2ediff.monitor.probe import figures_line
from e2ediff.step.assembly import Assembly, assemble
from e2ediff.step.compiling import uncompiled
from e2ediff.step.update import Update
from e2ediff.store.checkpoint import checkpoint_at, drop_after, open_checkpoint, save
from e2ediff.store.manifest import Checkpoint
from e2ediff.store.run_directory import RunDirectory, State
from e2ediff.store.storage import JSON
from e2ediff.train.clock import Clock
from e2ediff.train.continuation import describe
from e2ediff.train.observers import RunView, Sinks, notify
from e2ediff.train.progress import Progress, training_line
from e2ediff.train.snapshot import put_back, snapshots, take, take_snapshot


class Engine:
    """One run: builds everything from a recipe, trains, looks, saves."""

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
    ) -> None:
        """Build what the recipe asks for; `choose_threads` is `train`'s."""
        self.host = host
        self.recipe = recipe
        self.directory = directory
        self.device = device
        self.progress = progress
        self.world = world or World()
        self.training = sources[0]
        self._data = describe(sources)
        self.parts: Assembly = assemble(recipe, device, self.world)
        self.update = Update(recipe, self.parts, self.world, self._tell)
        self.monitor = Monitor.open(host, recipe, self.parts, self.world, sources, device)
        self.bad_images = BadImages(directory.store)
        self.skip([bad for source in sources for bad in taken(source)])
        trackers = recipe.trackers if self.world.leads else ()
        self.sinks = Sinks(trackers, directory, progress)
        self.step = self.images = 0
        self.last_checkpoint: str | None = None
        self._saved_at = -1
        self.health: dict[str, float] = {}
        self.watch = Watch(recipe.alarm)
        self.clock = Clock()
        self.choose_threads = choose_threads
        self.threads: Threads | None = None
        self._latest: Batch | None = None

    # Running

    def run(self, stop: Stop) -> None:
        """Train from where the engine stands to the end, or until `stop` is asked.

        Raises:
            DivergedError: A loss or gradient is not finite.
            CollapseError: The alarm ended the run.
            DataError, ResourceError: As the data and the disk have it.
        """
        r, error = self.recipe, None
        self.sinks.open()
        self._notify("run_started")
        self.set_status("running")
        already_done = self.step >= r.total_steps
        try:
            self._refuse_spent()
            if already_done:
                self._end_again()
            if self.step == 0:
                self.look()
            if r.alarm.policy == "rollback" and self.watch.anchor is None:
                self.save()
            while not (already_done or self._asked(stop) or self._train(stop)):
                pass
            if self._saved_at != self.images:
                self.save()
            self.finish()
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.sinks.close()
            self._notify("run_ended", error=error)

    def _train(self, stop: Stop) -> bool:
        """Steps to the end; False if the alarm sent the run back instead."""
        r, cadence, total = self.recipe, self.recipe.cadence, self.recipe.total_steps
        self.clock.start(self.step)
        try:
            for batch in self._batches():
                self._latest = batch
                if self.threads is None:
                    self.threads = self._open_threads()
                began = time.perf_counter()
                self.advance(batch)
                if self.step < total:
                    self._count_pace(time.perf_counter() - began)
                if self.monitor.due(self.step):
                    self.look()
                if self.monitor.preview_due(self.step):
                    self.preview()
                if self.monitor.scores_due(self.step):
                    self.score()
                if self.step % cadence.checkpoint == 0 and self.step < total:
                    self.save()
                if r.snapshot_steps and self.step % r.snapshot_steps == 0 and self.step < total:
                    self.snapshot()
                if self._asked(stop):
                    break
        except CollapseError:
            if self.watch.may_return:
                self.go_back()
                return False
            self.save()
            self.finish()
            raise
        return True

    def _refuse_spent(self) -> None:
        """End a run at once whose alarm ended it after its last return.

        Raises:
            CollapseError: It is such a run.
        """
        watch = self.watch
        rollback = self.recipe.alarm.policy == "rollback"
        if watch.on and rollback and watch.attempt and not watch.may_return:
            raise CollapseError(f"step {self.step}: the latents have collapsed. {watch.advice()}")

    def _end_again(self) -> None:
        """What a run whose alarm sounded at its last step has left to do.

        Raises:
            CollapseError: The alarm ends it still.
        """
        if self.watch.on and self.recipe.alarm.policy != "warn":
            raise CollapseError(
                f"step {self.step}, the last one: the latents have collapsed. "
                f"{self.watch.advice()}"
            )
        if not self.directory.store.exists(f"samples/step-{self.step:08d}.png"):
            self.preview()
            if self.monitor.scores_due(self.step):
                self.score()

    def _asked(self, stop: Stop) -> bool:
        """Whether any process was asked to stop: all of them then stop after the same step."""
        agreed = self.world.highest(stop.signal or 0)
        if agreed:  # else a signal may have come while the processes agreed: it counts next time
            if not stop.asked:
                stop.note(agreed)
            stop.signal = agreed
        return bool(agreed)

    def _batches(self) -> Iterator[Batch]:
        r = self.recipe
        return batches(
            self.training,
            batch=r.batch,
            seed=r.seed,
            first=self.step,
            last=r.total_steps,
            flip=r.data.flip,
            workers=r.data.workers,
            device=self.device,
            sampling=r.data.sampling,
            report=self.skip,
            rows=self.update.rows,
        )

    # Threads

    def _open_threads(self) -> Threads:
        """Take the number of CPU threads: the one set, the former one, or the faster one."""
        if self.device.type != "cpu":
            return Threads(self._attempt, self._report_threads, fixed=True)
        former = [0, 0.0]
        if self.step > 0:
            former = self.world.lead(lambda: [*former_threads(self.directory, self.images)])
        count, pace = int(former[0]), former[1]
        if not self.choose_threads and count not in (0, now := torch.get_num_threads()):
            self.directory.event("threads", step=self.step, images=self.images, count=now)
        threads = Threads(
            self._attempt,
            self._report_threads,
            world=self.world,
            count=count,
            pace=pace / self.recipe.batch,
            fixed=not self.choose_threads,
        )
        with self.clock.paused():
            threads.begin()
        return threads

    def _count_pace(self, seconds: float) -> None:
        if self.threads is not None:
            with self.clock.paused():
                self.threads.done(1.0, seconds)

    def _attempt(self) -> None:
        """A piece of a step, for its time alone."""
        assert self._latest is not None
        self.update.rehearse(self._latest, self.images, self.watch.attempt)

    def _report_threads(self, line: str, count: int, of: int) -> None:
        self._tell("threads", line, count=count, of=of)

    def skip(self, found: Sequence[Skipped]) -> None:
        """List damaged images that were not used; the first one is also said."""
        if self.bad_images.add(found):
            place = self.directory.store.where(BAD_IMAGES)
            self.progress.say(
                f"skipped {found[0].place}: {found[0].what}. All such images are listed in {place}"
            )

    def advance(self, batch: Batch) -> None:
        """One training step, and what is recorded of it."""
        r = self.recipe
        logging = (self.step + 1) % r.cadence.log == 0 or self.step + 1 == r.total_steps
        record = self.update(batch, self.images, self.watch.attempt)
        self.step += 1
        self.images += r.batch
        if logging:
            self._log(record)
        self._notify("step_ended", step=self.step)

    # Looking

    def _log(self, record: Mapping[str, Tensor | float]) -> None:
        """Read figures from the device, record them, and stop if one is not finite."""
        values = self._averaged(record)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        rate = self.clock.rate(self.step, self.recipe.batch)
        self._record({**values, "wall_images_per_second": round(rate, 1)})
        if bad:
            are = "is" if len(bad) == 1 else "are"
            raise self._diverged(f"{', '.join(bad)} {are} not finite.")
        self.watch.record(values)
        losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        self._notify("losses_logged", step=self.step, losses=losses)
        self.progress.update(
            training_line(
                self.step,
                self.recipe.total_steps,
                rate,
                self.recipe.batch,
                losses,
                figures_line(self.health),
            )
        )

    def _averaged(self, record: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Figures as numbers: losses summed over the processes' shares of them."""
        own = {"lr", "grad_norm"}  # the same in every process
        shared = [name for name in record if name not in own]
        sums = [torch.as_tensor(record[name], device=self.device).float() for name in shared]
        added = self.world.total(torch.stack(sums)).tolist() if sums else []
        values = dict(zip(shared, added, strict=True))
        return {name: values.get(name, float(record[name])) for name in record}

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"step {self.step}: {what} The last good checkpoint is "
            f"{self.last_checkpoint or 'none yet'}. Lower the learning rate (optimizer.lr), or "
            "give optimizer.clip a smaller norm."
        )

    def _record(self, values: Mapping[str, float]) -> None:
        self.directory.log_metrics({"step": self.step, "images": self.images, **values})
        self.sinks.log(self.images, values)

    def look(self) -> None:
        """Measure the diagnostics, and sound the alarm if the latents have collapsed.

        Raises:
            CollapseError: They have, and the recipe's alarm does more than warn.
        """
        with self.clock.paused():
            began = time.perf_counter()
            phases = self.update.phases(self.images) or self.recipe.objective.phases[-1:]
            try:
                found = self.monitor.diagnose(self.step, phases)
            except DivergedError as error:
                raise self._diverged(str(error)) from error
            self.health = found  # a figure of an earlier survey would look like one of now
            self._figures(found, "wall_look_seconds", began)
            if self.step > 0:
                self._judge(found)

    def score(self) -> None:
        """Measure the recipe's `scores`."""
        with self.clock.paused():
            began = time.perf_counter()
            self._figures(self.monitor.score(), "wall_score_seconds", began)

    def preview(self) -> None:
        """Sample a sheet with fixed noise, and reconstruct probe images."""
        with self.clock.paused():
            name, seen = f"step-{self.step:08d}.png", self.monitor.preview()
            self.directory.write_picture(name, grid_png(seen.x, seen.columns))
            self.directory.write_picture(f"reconstructions-{name}", grid_png(seen.pairs, 10))
            self.sinks.picture(self.images, "samples", seen.x)
            self._notify("sampled", images=seen.x, labels=seen.label)

    def _figures(self, found: Mapping[str, float], timed: str, began: float) -> None:
        """Record figures with the time that they took, and tell plugins."""
        seconds = time.perf_counter() - began
        self.directory.declare(self.monitor.figures)
        self._record({**found, timed: round(seconds, 4)})
        self._notify("diagnosed", step=self.step, values=found)
        self._tell_failures()

    def _tell_failures(self) -> None:
        """Say which diagnostics and metrics failed since this was called last."""
        for kind, text in self.monitor.observer.isolated.drain():
            self._tell(kind, text)

    def _judge(self, figures: Mapping[str, float]) -> None:
        verdict = self.monitor.observer.verdict(figures)
        self._tell_failures()
        found = self.watch.evaluate(figures, verdict, self.step)
        said, signs = "; ".join(found.signs), [*found.signs]
        if found.change:
            self.directory.event(found.change, step=self.step, images=self.images, signs=signs)
            words = f"LATENT COLLAPSE: {said}" if self.watch.on else "the latents have recovered"
            self.progress.say(f"step {self.step}: {words}")
        if self.watch.on and self.recipe.alarm.policy != "warn":
            raise CollapseError(f"step {self.step}: {said}. {self.watch.advice()}")

    def finish(self) -> None:
        """Draw the curves."""
        if not self.world.leads:
            return
        metrics = self.directory.read_metrics()
        picture = curves_png(metrics, self.recipe.name, self.directory.figures())
        self.directory.store.write("curves.png", picture)

    def set_status(self, state: State, code: int | None = None, reason: str = "") -> None:
        """Replace `status.json` by how the run stands now."""
        self.directory.set_status(
            state,
            images=self.images,
            step=self.step,
            exit_code=code,
            reason=reason,
            last_checkpoint=self.last_checkpoint,
            collapsed=self.watch.collapsed,
        )

    def _tell(self, kind: str, text: str, **fields: JSON) -> None:
        """Record an event, and say it."""
        self.directory.event(kind, step=self.step, images=self.images, text=text, **fields)
        self.progress.say(f"step {self.step}: {text}")

    def _notify(self, hook: str, **values: object) -> None:
        """Tell plugins; those of the first process only, so that nothing is done twice."""
        if not self.world.leads:
            return
        run = RunView(self.recipe, self.directory.path, str(self.device), self.images)
        notify(self.host, run, self.progress, hook, values)

    # Saving

    def save(self) -> None:
        """Write a checkpoint; the statistics of every set of weights are those weights' own."""
        with self.clock.paused():
            watch = self.watch
            regular = self.step % self.recipe.cadence.checkpoint == 0 or watch.anchor is None
            if self.recipe.alarm.policy == "rollback" and regular and watch.clean:
                watch.anchor = self.images
            with uncompiled(self.recipe):
                held = take(self.parts, self.monitor.observer.calibration, keep=self.world.leads)
            write = partial(
                save,
                self.directory.store,
                self.images,
                self.step,
                held.files,
                {**held.state, "alarm": watch.state(), "data": self._data},
                keep=self.recipe.checkpoint.keep,
                warn=self.progress.say,
                spare=watch.anchor,
            )
            try:
                self.last_checkpoint = self.world.lead(write)
            except DivergedError as error:
                raise self._diverged(str(error)) from error
            self._saved_at = self.images
            self.directory.event(
                "saved", step=self.step, images=self.images, name=self.last_checkpoint
            )
            self.set_status("running")
            self._notify("checkpoint_saved", path=self.last_checkpoint)

    def snapshot(self) -> None:
        """Store the averages that other widths are reconstructed from."""
        post_hoc = self.recipe.post_hoc
        assert post_hoc is not None
        with self.clock.paused():
            files = take_snapshot(self.parts, self.recipe, keep=self.world.leads)
            try:
                self.world.lead(
                    partial(
                        save, snapshots(self.directory.store), self.images, self.step, files, {},
                        keep=post_hoc.keep, warn=self.progress.say,
                    )
                )  # fmt: skip
            except DivergedError as error:
                raise self._diverged(str(error)) from error

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: Its tensors do not fit the recipe.
        """
        put_back(self.parts, checkpoint, self.device)
        self.step, self.images = checkpoint.step, checkpoint.images
        self.last_checkpoint, self._saved_at = checkpoint.name, checkpoint.images
        self.watch.restore(checkpoint.state.get("alarm", {}))
        self.rewind(self.images)

    def rewind(self, images: int) -> None:
        """Drop figures and snapshots of more images than these: they will be made anew."""
        self.directory.rewind(images)
        if self.recipe.post_hoc and self.world.leads:
            drop_after(snapshots(self.directory.store), images, self.progress.say)

    def go_back(self) -> None:
        """Return to the checkpoint from before the first sign, and draw otherwise from there.

        Raises:
            CheckpointError: It is damaged or was removed.
        """
        step, images, attempt = self.step, self.images, self.watch.attempt + 1
        store, anchor = self.directory.store, self.watch.anchor or 0
        # The run has no option for another one, and goes on from the newest.
        use = "continue with --resume"
        found = open_checkpoint(store, checkpoint_at(store, anchor), use=use)
        kept = self.directory.set_aside(found.images, found.step)
        self.restore(found)
        self.watch.attempt = attempt
        place = self.last_checkpoint
        self.directory.event(
            "rewound", step=step, images=images, to=place, attempt=attempt, kept=kept
        )
        self.progress.say(
            f"step {step}: went back to step {self.step} ({place}), to draw other noise; return "
            f"{attempt} of at most {self.recipe.alarm.attempts}. What was recorded since is kept "
            f"in {store.where(kept)}"
        )
        # At once, so that a crash does not undo it; later checkpoints are set aside.
        self.save()
