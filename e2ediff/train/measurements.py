"""Measure and record a run's losses, diagnoses, scores and previews, and evaluate its alarm."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from e2ediff.errors import CollapseError, DivergedError
from e2ediff.host.recipe import Recipe
from e2ediff.monitor.alarm import CollapseDetector
from e2ediff.monitor.monitor import Monitor
from e2ediff.monitor.pictures import curves_png
from e2ediff.monitor.probe import figures_line
from e2ediff.train.continuation import continue_command
from e2ediff.train.progress import training_line
from e2ediff.train.recorder import Recorder


@attrs.define(eq=False)
class Measurements:
    """Measures a run, records the results, and raises if they must end it or roll it back."""

    recipe: Recipe
    monitor: Monitor
    detector: CollapseDetector
    recorder: Recorder
    health: dict[str, float] = attrs.field(factory=dict)

    def log(self, record: Mapping[str, Tensor | float], *, skipped: bool = False) -> None:
        """Read a step's losses and figures from the device, and record them.

        Of a step whose update was `skipped` only those that are finite.

        Raises:
            DivergedError: One of them is not finite.
        """
        r, step, values = self.recipe, self.recorder.position.step, self._averaged(record)
        if skipped:
            values = {name: value for name, value in values.items() if math.isfinite(value)}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        rate = self.recorder.clock.rate(step, r.batch)
        self.recorder.figures({**values, "wall_images_per_second": round(rate, 1)})
        if bad:
            are = "is" if len(bad) == 1 else "are"
            raise self.recorder.diverged(f"{', '.join(bad)} {are} not finite.")
        self.detector.record(values)
        losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        self.recorder.notify("losses_logged", step=step, losses=losses)
        health = figures_line(self.health, self.monitor.figures)
        line = training_line(step, r.total_steps, rate, r.batch, losses, health)
        self.recorder.progress.update(line)

    def _averaged(self, record: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Return figures as numbers, with losses summed over the processes."""
        # Learning rates and gradient norms are the same in every process.
        shared = [name for name in record if name.partition("/")[0] not in ("lr", "grad_norm")]
        device = self.recorder.device
        sums = [torch.as_tensor(record[name], device=device).float() for name in shared]
        added = self.recorder.world.total(torch.stack(sums)).tolist() if sums else []
        values = dict(zip(shared, added, strict=True))
        return {name: values.get(name, float(record[name])) for name in record}

    def diagnose(self, phases: Sequence[str]) -> None:
        """Measure the diagnostics, and sound the alarm if the latents have collapsed.

        Args:
            phases: Phases of the objective whose losses' gradients are measured.

        Raises:
            DivergedError: Outputs of the networks on the probe are not finite.
            CollapseError: The latents have collapsed, and the alarm does more than warn.
        """
        step = self.recorder.position.step
        with self.recorder.clock.paused():
            began = time.perf_counter()
            try:
                found = self.monitor.diagnose(step, phases)
            except DivergedError as error:
                raise self.recorder.diverged(str(error)) from error
            self.health = found  # Replace, don't merge: old survey figures would look current.
            self._record(found, "wall_look_seconds", began)
            if step > 0:
                self._judge(found)

    def _judge(self, figures: Mapping[str, float]) -> None:
        """Update the alarm, and end the run if its policy says so."""
        step, detector = self.recorder.position.step, self.detector
        verdict = self.monitor.observer.verdict(figures)
        self._report_failures()
        found = detector.evaluate(figures, verdict, step)
        said = "; ".join(found.signs)
        if found.change:
            self.recorder.event(found.change, signs=[*found.signs])
            words = f"LATENT COLLAPSE: {said}" if detector.on else "the latents have recovered"
            self.recorder.progress.say(f"step {step}: {words}")
        if detector.on and self.recipe.alarm.policy != "warn":
            regardless = continue_command(self.recorder.directory.path, "alarm.policy=warn")
            raise CollapseError(f"step {step}: {said}. {detector.advice(regardless)}")

    def score(self) -> None:
        """Measure and record the recipe's `scores`."""
        with self.recorder.clock.paused():
            began = time.perf_counter()
            self._record(self.monitor.score(), "wall_score_seconds", began)

    def preview(self) -> None:
        """Sample a sheet with fixed noise, and reconstruct probe images."""
        at, directory = self.recorder.position, self.recorder.directory
        with self.recorder.clock.paused():
            name = f"step-{at.step:08d}.png"
            seen = self.monitor.preview(
                f"{self.recipe.name}, step {at.step:,}, {at.images:,} images seen"
            )
            directory.write_picture(name, seen.samples)
            directory.write_picture(f"reconstructions-{name}", seen.reconstructions)
            self.recorder.trackers.picture(at.images, "samples", seen.x)
            self.recorder.notify("sampled", images=seen.x, condition=seen.condition)

    def draw_curves(self) -> None:
        """Draw the curves of all figures so far."""
        if self.recorder.world.is_leader:
            directory = self.recorder.directory
            curves = curves_png(directory.stream_metrics(), self.recipe.name, directory.figures())
            directory.store.write("curves.png", curves)

    def _record(self, found: Mapping[str, float], timed: str, began: float) -> None:
        """Record figures with the time that they took, and notify plugins."""
        seconds = time.perf_counter() - began
        self.recorder.directory.declare(self.monitor.figures)
        self.recorder.figures({**found, timed: round(seconds, 4)})
        self.recorder.notify("diagnosed", step=self.recorder.position.step, values=found)
        self._report_failures()

    def _report_failures(self) -> None:
        """Report diagnostics and metrics that have failed since the last call."""
        for kind, text in self.monitor.observer.isolated.drain():
            self.recorder.report(kind, text)
