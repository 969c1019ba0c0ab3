"""`e2ediff plan`."""

from __future__ import annotations

import json

import click

from e2ediff.terminal import echo
from e2ediff_plan.devices import NAMES


@click.command("plan")
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="As for `run`.")
@click.option(
    "--device",
    type=click.Choice(NAMES),
    default="h200",
    show_default=True,
    help="What to price for; 'measured' times this machine.",
)
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.35,
    show_default=True,
    help="Share of the device's matrix-product ceiling that training reaches.",
)
@click.option("--json", "as_text", is_flag=True, help="Print JSON: bytes, seconds, FLOPs.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    device: str,
    gpus: int,
    fraction: float,
    as_text: bool,
) -> None:
    """Forecast what RECIPE takes: FLOPs of every pass, memory, hours, disk.

    Needs no GPU, unless measured, and no data, unless `data` is the address of images alone.
    Every assumption is printed with its source.
    """
    from e2ediff.host.plugins import load
    from e2ediff.host.recipe import load_recipe
    from e2ediff.model.build import check_fits
    from e2ediff.train.progress import Progress
    from e2ediff_plan.plan import make_plan
    from e2ediff_plan.text import as_json, lines

    host = load()
    with Progress() as progress:
        read = load_recipe(host, recipe, overrides, progress=progress)
        with progress.doing("counting FLOPs and memory"):
            check_fits(read, recipe)
            plan = make_plan(host, read, recipe, device=device, gpus=gpus, fraction=fraction)
    if as_text:
        echo(json.dumps(as_json(plan), indent=1), lines=True)
        return
    for line in lines(plan):
        echo(line)
