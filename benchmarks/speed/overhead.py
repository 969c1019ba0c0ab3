"""What the engine costs over a hand-written loop of the same modules.

    python benchmarks/speed/overhead.py
    python benchmarks/speed/overhead.py --size block --steps 400

Both loops take turns by single steps in one process. The hand-written one has the same images,
draws, networks and fused optimizer, torch's clipping, one `_foreach_lerp_` for the average, and
the schedule's rate: what a script would have. The engine's step is measured from the end of one
to the end of the next: its loader, guards, hooks and checks for signals included, looks, logs and
saves not. Half of the difference's spread is the place of a step in the caches.
Neither is compiled, or both as `--set compile=blocks` or `step` says.
"""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from measuring import Report, benchmark, clock
from networks import SIZES, read

from e2ediff.distributed.signals import Stop
from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe
from e2ediff.loading.batches import batches
from e2ediff.step.assembly import assemble
from e2ediff.step.draws import training_draw
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.engine import Engine
from e2ediff.train.progress import Progress

_WARM = 10  # steps of each that are not counted


class _Turns(Engine):
    """An engine that lets the other loop take a step after each of its own."""

    other: Callable[[], float]
    clock: Callable[[], float]

    def begin(self, other: Callable[[], float], clock: Callable[[], float]) -> None:
        self.other, self.clock = other, clock
        self.own: list[float] = []
        self.others: list[float] = []
        self._since = clock()

    def _asked(self, stop: Stop) -> bool:
        asked = super()._asked(stop)
        self.own.append(self.clock() - self._since)
        self.others.append(self.other())
        self._since = self.clock()
        return asked


def hand_written(recipe: Recipe, device: torch.device, source: Any) -> Callable[[], None]:
    """Return a function that takes the next step of a loop as a script would have it."""
    parts = assemble(recipe, device)
    phase = recipe.objective.phases[0]
    optimizer, config = parts.optimizers[phase], recipe.optimizer
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    average = [*parts.averages["target"].net.parameters()]
    online = [*parts.nets.online.parameters()]
    decay = 0.995
    loader = batches(
        source, recipe.data.image, batch=recipe.batch, seed=recipe.seed, first=0,
        last=recipe.total_steps + 1, flip=recipe.data.flip, workers=recipe.data.workers,
        device=device, sampling=recipe.data.sampling, microshards=recipe.microshards,
    )  # fmt: skip
    images = 0

    def step() -> None:
        nonlocal images
        batch = next(loader)
        for group in optimizer.param_groups:
            done = images, recipe.total_images
            group["lr"] = group["initial_lr"] * config.group_factor(group.get("name", ""), *done)
        size = recipe.batch // recipe.microshards
        for shard in range(recipe.microshards):
            part = batch.rows(slice(shard * size, (shard + 1) * size))
            draw = training_draw(recipe, phase, images, 0, part.condition, shard)
            total, _, _ = parts.step(part, draw, phase)
            (total / recipe.microshards).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, online, 1 - decay)
        images += recipe.batch

    return step


def prepared(size: str, changes: tuple[str, ...], device: torch.device, steps: int) -> Recipe:
    """Return the recipe of a size for this many steps, uncompiled unless `changes` say how."""
    own = [*changes, f"device={device}"]
    if SIZES.get(size, ("",))[0].endswith("in256.yaml"):
        own.append("data={name: synthetic, size: 256}")
    every = "cadence={log: 1000000, diagnose: 1000000, preview: 1000000, checkpoint: 1000000}"
    recipe = read(size, "compile=off", *own, f"steps={steps + 2 * _WARM}", every)
    if recipe.compile == "auto":  # the engine would decide, in the middle of what is timed
        raise click.UsageError("--set compile=auto: name what both loops are, as compile=blocks.")
    return recipe


@benchmark(rounds=1)
@click.option(
    "--size", "sizes", multiple=True, default=("quickstart", "block"), show_default=True,
    help="Of a recipe, or its path.",
)  # fmt: skip
@click.option("--set", "changes", multiple=True, help="As of `e2ediff run`.")
@click.option("--steps", default=120, show_default=True, type=click.IntRange(2))
def main(
    report: Report, rounds: int, sizes: tuple[str, ...], changes: tuple[str, ...], steps: int
) -> None:
    """Time both loops at each size."""
    device = report.device
    seconds = partial(clock, device)
    recipes = {size: prepared(size, changes, device, steps) for size in sizes}
    opened = {n: (r.data.open(), r.data.open(held_out=True)) for n, r in recipes.items()}
    report.probe()
    for size in sizes * rounds:
        recipe, sources = recipes[size], opened[size]
        with tempfile.TemporaryDirectory() as folder:
            directory = RunDirectory.create(folder + "/run", recipe.name, "", "", {})
            quiet = Progress(io.StringIO())
            engine = _Turns(load(), recipe, directory, device, sources, quiet)
            hand = hand_written(recipe, device, sources[0])

            def other(hand: Callable[[], None] = hand) -> float:
                began = seconds()
                hand()
                return seconds() - began

            engine.begin(other, seconds)
            with directory, quiet, Stop() as stop:
                engine.run(stop)
        mine, theirs = (all_of[_WARM:][:steps] for all_of in (engine.own, engine.others))
        ratios = sorted(a / b for a, b in zip(mine, theirs, strict=True))
        gaps = [a - b for a, b in zip(mine, theirs, strict=True)]
        ratio, gap = statistics.median(ratios), statistics.median(gaps)
        least = min(mine) / min(theirs)
        report.row(
            f"{size}: engine {1e3 * statistics.median(mine):.2f} ms a step, hand-written "
            f"{1e3 * statistics.median(theirs):.2f} ms: {ratio:.3f} times (of least ones "
            f"{least:.3f}), {1e6 * gap:+.0f} us",
            size=size, compile=recipe.compile, steps=len(mine),
            engine_ms=1e3 * statistics.median(mine), hand_ms=1e3 * statistics.median(theirs),
            ratio=ratio, of_least=least, difference_us=1e6 * gap,
            quartiles=statistics.quantiles(ratios, n=4),
        )  # fmt: skip
        report.probe()


if __name__ == "__main__":
    main()
