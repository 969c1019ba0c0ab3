"""What looking at a run costs, as a share of training.

    python benchmarks/observatory_cost.py recipes/quickstart.yaml

CPU seconds of this process on the CPU, seconds of the clock on a GPU. The share is that of all
looks and surveys of the recipe over all its steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs
import click
import torch

from e2ediff.data import Batch
from e2ediff.diagnostic import Probe
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.model.build import choose_device
from e2ediff.model.calibration import at_rest, own_latents
from e2ediff.monitor.probe import Observer, chosen_diagnostics
from e2ediff.step.assembly import assemble
from e2ediff.step.draws import draw_for


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The least of several timings, after a first one that is thrown away."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken = []
    for _ in range(repeats + 1):
        began = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - began)
    return min(taken[1:])


@click.command()
@click.argument("recipe_path", default="recipes/quickstart.yaml")
@click.option("--set", "overrides", multiple=True, help="As of `e2ediff run`.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(recipe_path: str, overrides: tuple[str, ...], repeats: int, threads: int) -> None:
    """Time a step and a look of a recipe, and every diagnostic of the look."""
    torch.set_num_threads(threads)
    host = load()
    recipe = load_recipe(host, recipe_path, overrides)
    device = choose_device(recipe.device)
    training, held_out = recipe.data.open(), recipe.data.open(held_out=True)
    parts = assemble(recipe, device)
    chosen = chosen_diagnostics(host, recipe)
    observer = Observer.open(recipe, chosen, training, held_out, device)
    phase = recipe.objective.phases[0]
    size = recipe.batch // recipe.microshards
    enough = observer.calibration.repeat(-(-size // len(observer.calibration)), 1, 1, 1)
    batch = Batch(x=enough[:size], condition=recipe.data.image.conditioning.null(size, device))

    def step() -> None:
        parts.step.zero_grad(set_to_none=True)
        for shard in range(recipe.microshards):
            draw = draw_for(recipe, batch.condition, "cost", shard)
            parts.step(batch, draw, phase)[0].backward()
        parts.optimizers[phase].step()
        for average in parts.averages.values():
            average.update()

    one_step = seconds(step, device, 3 * repeats)
    glance, survey = (
        seconds(lambda s=s: observer.measure(parts.step, [phase], survey=s), device, repeats)  # type: ignore[misc]
        for s in (False, True)
    )
    cadence, total = recipe.cadence, recipe.total_steps
    every, rarely = cadence.diagnose, cadence.survey or 10 * cadence.diagnose
    surveys = len({*range(0, total + 1, rarely), total})
    looks = len({*range(0, total + 1, every), total})
    spent = glance * (looks - surveys) + survey * surveys
    click.echo(f"step {one_step * 1e3:.1f} ms, {total} of them")
    click.echo(f"look {glance * 1e3:.1f} ms, {looks - surveys} of them, every {every} steps")
    click.echo(f"survey {survey * 1e3:.1f} ms, {surveys} of them, every {rarely} steps")
    click.echo(f"looking costs {spent / (total * one_step):.2%} of the steps of the run")
    pulls = observer.gradients(parts.step, [phase])
    taken = seconds(lambda: observer.gradients(parts.step, [phase]), device, repeats)
    click.echo(f"  {taken * 1e3:8.1f} ms  gradients of the terms")
    with torch.no_grad(), at_rest(parts.nets.target) as net:
        x, condition, few = observer.probe.x, observer.probe.condition, recipe.probe.glance
        z, raw = own_latents(net, x)
        guesses = {t: z[:few] * t for t in recipe.probe.times}
        more = Probe(
            x,
            condition,
            z,
            raw,
            recipe.predicts,
            recipe.interpolant,
            x[:few],
            guesses,
            z[:few],
            pulls,
        )
        less = attrs.evolve(
            more, x=x[:few], condition=condition.rows(slice(few)), z=z[:few], raw=raw[:few]
        )
    whole = 0.0
    for diagnostic in chosen:
        probe = more if "many" in diagnostic.asks else less
        taken = seconds(lambda d=diagnostic, p=probe: d.measure(p), device, repeats)  # type: ignore[misc]
        whole += taken
        click.echo(f"  {taken * 1e3:8.1f} ms  {type(diagnostic).__name__}")
    click.echo(f"  {whole * 1e3:8.1f} ms  all diagnostics")


if __name__ == "__main__":
    main()
