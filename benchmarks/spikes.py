"""Does the rule for spikes find spikes, without false alarms?

    python benchmarks/spikes.py --out spikes

Trains quickstarts of several seeds, logging every step, and has the guard of a run judge their
losses and gradient norms again, as they are and with spikes multiplied in: one step x20, and
50 steps x5, of which one has to be found. The weights do not follow a spike here: it is what the
guard sees that is tried, with a window filled by the steps before.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import attrs
import click
import torch
from torch import nn

from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import Guards, Recipe, load_recipe
from e2ediff.step.guard import Guard, Share
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
CADENCE = "cadence={log: 1, diagnose: 1000000, preview: 1000000, checkpoint: 1000000}"
WEIGHTS = {"loss/denoising": 0.1}
"""Of the quickstart's terms in its loss; others count once."""

Numbers = Sequence[tuple[float, float]]
"""Weighted loss and gradient norm of steps that follow one another."""


def numbers(directory: Path) -> Numbers:
    """Read those of a run from its figures."""
    rows = [row for row in RunDirectory.open(str(directory)).read_metrics() if "grad_norm" in row]
    return [
        (
            sum(WEIGHTS.get(k, 1.0) * v for k, v in row.items() if k.startswith("loss/")),
            row["grad_norm"],
        )
        for row in rows
    ]


class Judge:
    """A run's guard, which is told numbers."""

    def __init__(self, recipe: Recipe, factor: float, window: int) -> None:
        guards = Guards(spike="skip", factor=factor, window=window)
        self.guard = Guard(attrs.evolve(recipe, guards=guards), World(), torch.device("cpu"))
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)

    def spikes(self, told: Numbers, times: float = 1.0) -> int:
        """Return in how many of these steps it makes no update."""
        for loss, norm in told:
            share = Share(1, torch.tensor(loss * times), {})
            self.guard.update(self.optimizer, "joint", 0, [share], torch.tensor(norm * times))
        return len(self.guard.take())


@click.command()
@click.option("--out", type=Path, required=True, help="Directory for the runs.")
@click.option("--seeds", type=int, default=5)
@click.option("--steps", type=int, default=1500)
@click.option("--factors", default="4,5,6,7,8")
@click.option("--every", type=int, default=10, help="Steps between starts of spikes.")
def main(out: Path, seeds: int, steps: int, factors: str, every: int) -> None:
    """Print a table: false alarms, and spikes that are found, of each factor."""
    host, window = load(), 200
    recipe = load_recipe(host, str(QUICKSTART))
    runs = []
    for seed in range(seeds):
        place = out / f"seed-{seed}"
        if not place.exists():
            changes = [f"seed={seed}", f"steps={steps}", CADENCE]
            train(host, str(QUICKSTART), changes, str(place), progress=Progress(io.StringIO()))
        runs.append(numbers(place))
    click.echo("| factor | false alarms | x20, one step | x5, 50 steps |\n|---|---|---|---|")
    for factor in map(float, factors.split(",")):
        false = sum(Judge(recipe, factor, window).spikes(run) for run in runs)
        one = many = tried = 0
        for run in runs:
            for start in range(window, len(run) - 50, every):
                before = Judge(recipe, factor, window)
                before.spikes(run[start - window : start])
                state = before.guard.state()
                one += before.spikes(run[start : start + 1], 20.0)
                before.guard.restore(state)
                many += before.spikes(run[start : start + 50], 5.0) > 0
                tried += 1
        judged = sum(len(run) - window for run in runs)
        click.echo(f"| {factor:g} | {false} of {judged} | {one} of {tried} | {many} of {tried} |")


if __name__ == "__main__":
    main()
