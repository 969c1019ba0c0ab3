"""The training loop: machinery without science.

What is learned, from what, and where gradients stop, is the objective's; the engine never
learns a loss's name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor, nn

from e2ediff.data import Batch, DataSource
from e2ediff.errors import DivergedError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.objective import Draw
from e2ediff.run.assembly import Assembly, assemble
from e2ediff.run.checkpoint import load_weights, save
from e2ediff.run.directory import RunDirectory
from e2ediff.run.ema import calibrate
from e2ediff.run.loader import batches
from e2ediff.run.manifest import Checkpoint
from e2ediff.run.optimizer_state import flatten_optimizer, restore_optimizer
from e2ediff.run.pictures import curves_png, grid_png
from e2ediff.run.probing import Observer, chosen_diagnostics, figures_line
from e2ediff.run.progress import Progress, training_line
from e2ediff.run.seeds import generator
from e2ediff.run.signals import Stop
from e2ediff.run.sinks import Sinks
from e2ediff.run.storage import JSON


@attrs.frozen(eq=False)
class RunView:
    """What observers see of a run: nothing they could change it by."""

    recipe: Recipe
    directory: str
    device: str
    images_seen: int


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
    ) -> None:
        self.host = host
        self.recipe = recipe
        self.directory = directory
        self.device = device
        self.progress = progress
        self.training, held_out = sources
        self.parts: Assembly = assemble(recipe, device)
        self.observer = Observer.open(
            recipe, chosen_diagnostics(host, recipe), self.training, held_out, device
        )
        self.sinks = Sinks(recipe.trackers, directory, progress)
        self.step = 0
        self.images = 0
        self.last_checkpoint: str | None = None
        self._saved_at = -1
        self.health: dict[str, float] = {}
        self._collapsed = False
        self._names = {p: name for name, p in self.parts.step.named_parameters()}
        self._clock = (time.perf_counter(), 0)

    # Running

    def run(self, stop: Stop) -> None:
        """Train from where the engine stands to the end, or until `stop` is asked.

        Raises:
            DivergedError: A loss or gradient is not finite.
            DataError, ResourceError: As the data and the disk have it.
        """
        r, error = self.recipe, None
        self.sinks.open()
        self._notify("run_started")
        self.directory.set_status(
            "running", images=self.images, step=self.step, last_checkpoint=self.last_checkpoint
        )
        already_done = self.step >= r.total_steps
        try:
            if self.step == 0:
                self.look()
            self._clock = (time.perf_counter(), self.step)
            for batch in self._batches():
                self.advance(batch)
                if self.step % r.cadence.diagnose == 0 and self.step < r.total_steps:
                    self.look()
                if self.step % r.cadence.preview == 0 and self.step < r.total_steps:
                    self.preview()
                if self.step % r.cadence.checkpoint == 0 and self.step < r.total_steps:
                    self.save()
                if stop.asked:
                    break
            if self.step >= r.total_steps and not already_done:
                self.look()
                self.preview()
            if self._saved_at != self.images:
                self.save()
            self.finish()
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.sinks.close()
            self._notify("run_ended", error=error)

    def _batches(self) -> Iterator[Batch]:
        r = self.recipe
        return batches(
            self.training,
            batch=r.batch,
            seed=r.seed,
            first=self.step,
            last=r.total_steps,
            flip=r.data.flip,
            workers=getattr(r.data, "workers", 0),
            device=self.device,
        )

    def advance(self, batch: Batch) -> None:
        """One optimizer step in each active phase, then the averages."""
        r = self.recipe
        logging = (self.step + 1) % r.cadence.log == 0 or self.step + 1 == r.total_steps
        record: dict[str, Tensor | float] = {}
        for phase in self._active():
            record.update(self._optimize(batch, phase))
        for average in self.parts.averages.values():
            average.update()
        self.step += 1
        self.images += r.batch
        if logging:
            self._log(record)
        self._notify("step_ended", step=self.step)

    def _active(self) -> list[str]:
        done = self.images / self.recipe.total_images
        spans = {p: self.recipe.objective.span(p) for p in self.recipe.objective.phases}
        return [p for p, (start, end) in spans.items() if start <= done < end]

    def _optimize(self, batch: Batch, phase: str) -> dict[str, Tensor | float]:
        """One optimizer step of one phase; figures stay on the device."""
        r, optimizer = self.recipe, self.parts.optimizers[phase]
        config = r.optimizers.get(phase, r.optimizer)
        start, end = (share * r.total_images for share in r.objective.span(phase))
        factor = config.factor(round(self.images - start), round(end - start))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        # Of all parameters, not only this phase's: another phase's gradients must not linger.
        self.parts.step.zero_grad(set_to_none=True)
        record: dict[str, Tensor | float] = {"lr": optimizer.param_groups[0]["lr"]}
        size = r.batch // r.microshards
        for shard in range(r.microshards):
            rows = slice(shard * size, (shard + 1) * size)
            part = Batch(x=batch.x[rows], label=batch.label[rows])
            terms = self.parts.step(part, self._draw(part, phase, shard), phase)
            (terms.total / r.microshards).backward()
            for name, value in [*terms.losses.items(), *terms.info.items()]:
                key = f"loss/{name}" if name in terms.losses else name
                record[key] = record.get(key, 0.0) + value.detach() / r.microshards
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if config.clip > 0:
            record["grad_norm"] = nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        return record

    def _draw(self, part: Batch, phase: str, shard: int) -> Draw:
        """A micro-shard's randomness, from the seed and the number of images seen."""
        r, n = self.recipe, len(part.label)
        purpose = "draw" if phase == r.objective.phases[0] else f"draw-{phase}"
        g = generator(self.device, r.seed, purpose, self.images, shard)
        t = r.times.draw(n, g, self.device)
        dropped = torch.rand(n, generator=g, device=self.device) < r.label_drop
        label = torch.where(dropped, r.data.image.null_label, part.label)
        return Draw(t=t, label=label, generator=g, times=r.times)

    # Looking

    def _log(self, record: Mapping[str, Tensor | float]) -> None:
        """Read figures from the device, record them, and stop if one is not finite."""
        values = {name: float(value) for name, value in record.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        seconds = time.perf_counter() - self._clock[0]
        rate = (self.step - self._clock[1]) * self.recipe.batch / max(seconds, 1e-9)
        self._record({**values, "wall_images_per_second": round(rate, 1)})
        if bad:
            are = "is" if len(bad) == 1 else "are"
            raise self._diverged(f"{', '.join(bad)} {are} not finite.")
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
        """Measure the diagnostics, and say so in words if the latents have collapsed."""
        pause = time.perf_counter()
        try:
            self.health = self.observer.measure(self.parts.nets)
        except DivergedError as error:
            raise self._diverged(str(error)) from error
        self._record(self.health)
        self._notify("diagnosed", step=self.step, values=self.health)
        signs = self.observer.verdict(self.health) if self.step > 0 else []
        if signs and not self._collapsed:
            self.directory.event("collapse", step=self.step, images=self.images, signs=[*signs])
            self.progress.say(f"step {self.step}: LATENT COLLAPSE: {'; '.join(signs)}")
        elif self._collapsed and not signs:
            self.directory.event("recovered", step=self.step, images=self.images)
            self.progress.say(f"step {self.step}: the latents have recovered")
        self._collapsed = bool(signs)
        self._pause(pause)

    def preview(self) -> None:
        """Sample a sheet with fixed noise, and reconstruct probe images."""
        pause = time.perf_counter()
        net, name = self.parts.averages[self._shown()].net, f"step-{self.step:08d}.png"
        x, label = self.observer.samples(net)
        columns = len(label) // self.recipe.preview.rows
        self.directory.write_picture(name, grid_png(x, columns))
        pairs = self.observer.reconstructions(net, 20)
        self.directory.write_picture(f"reconstructions-{name}", grid_png(pairs, 10))
        self.sinks.picture(self.images, "samples", x)
        self._notify("sampled", images=x, labels=label)
        self._pause(pause)

    def _shown(self) -> str:
        """The weights that previews and `sample` use: the first extra average, or the target."""
        return self.recipe.ema[0].name if self.recipe.ema else "target"

    def _pause(self, since: float) -> None:
        """Leave time spent looking out of the images a second."""
        started, step = self._clock
        self._clock = (started + time.perf_counter() - since, step)

    def finish(self) -> None:
        """Draw the curves."""
        metrics = self.directory.read_metrics()
        self.directory.store.write("curves.png", curves_png(metrics, self.recipe.name))

    def _notify(self, hook: str, **values: object) -> None:
        """Tell observers; what they raise is theirs, and does not stop the run."""
        view = RunView(self.recipe, self.directory.path, str(self.device), self.images)
        try:
            getattr(self.host.hook, hook)(run=view, **values)
        except Exception as error:
            self.progress.say(f"a plugin's {hook} failed: {type(error).__name__}: {error}")

    # Saving

    def save(self) -> None:
        """Write a checkpoint; the statistics of every set of weights are those weights' own."""
        pause = time.perf_counter()
        nets, images = self.parts.nets, self.observer.calibration
        files: dict[str, Mapping[str, Tensor]] = {}
        calibrate(nets.online, images)
        files["online"] = nets.online.state_dict()
        if len(nets.heads):
            files["heads"] = nets.heads.state_dict()
        for name, average in self.parts.averages.items():
            calibrate(average.net, images)
            files[name] = average.net.state_dict()
        optimizers: dict[str, JSON] = {}
        for phase, optimizer in self.parts.optimizers.items():
            tensors, rest = flatten_optimizer(optimizer, self._names)
            files[f"optimizer-{phase}"] = tensors
            optimizers[phase] = rest
        state: dict[str, JSON] = {
            "averages": {n: a.updates for n, a in self.parts.averages.items()},
            "optimizers": optimizers,
            "choices": dict(self.parts.choices),
            "collapsed": self._collapsed,
        }
        try:
            self.last_checkpoint = save(
                self.directory.store,
                self.images,
                self.step,
                files,
                state,
                keep=self.recipe.checkpoint.keep,
                warn=self.progress.say,
            )
        except DivergedError as error:
            raise self._diverged(str(error)) from error
        self._saved_at = self.images
        self.directory.event(
            "saved", step=self.step, images=self.images, name=self.last_checkpoint
        )
        self.directory.set_status(
            "running", images=self.images, step=self.step, last_checkpoint=self.last_checkpoint
        )
        self._notify("checkpoint_saved", path=self.last_checkpoint)
        self._pause(pause)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: Its tensors do not fit the recipe.
        """
        nets = self.parts.nets
        modules: dict[str, nn.Module] = {"online": nets.online}
        modules |= {name: average.net for name, average in self.parts.averages.items()}
        if len(nets.heads):
            modules["heads"] = nets.heads
        for name, module in modules.items():
            load_weights(module, checkpoint, name)
        for name, average in self.parts.averages.items():
            average.updates = checkpoint.state["averages"][name]
        for phase, optimizer in self.parts.optimizers.items():
            restore_optimizer(
                optimizer,
                self._names,
                checkpoint.tensors(f"optimizer-{phase}", self.device),
                checkpoint.state["optimizers"][phase],
            )
        self.step, self.images = checkpoint.step, checkpoint.images
        self.last_checkpoint, self._saved_at = checkpoint.name, checkpoint.images
        self._collapsed = checkpoint.state["collapsed"]
        self.directory.rewind(self.images)
