"""`e2ediff check`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from e2ediff.cli import options
from e2ediff.terminal import echo


@click.command("check")
@click.argument("recipe")
@options.overrides()
@click.option("--resolved", is_flag=True, help="Print the resolved recipe and nothing else.")
def command(recipe: str, overrides: tuple[str, ...], resolved: bool) -> None:
    """Resolve RECIPE, build it on the meta device, and count its parameters and FLOPs.

    Needs no GPU, no memory for weights, and no data, unless `data` is the address of images alone:
    then it looks at them. Data that are on this machine are listed, and what is wrong with their
    files and classes is said. Weights of the objective's feature networks, and of the scores', are
    read, and refused after all else is printed, unless they are in a store.
    Prints the parts, the parameters of each module, shapes, and the FLOPs of one step.
    """
    from e2ediff.errors import RecipeError
    from e2ediff.host.plugins import load
    from e2ediff.host.recipe import dump_recipe, load_recipe
    from e2ediff.model.build import check_fits, idle_guidance
    from e2ediff.model.fixed_networks import (
        in_a_store,
        named_networks,
        random_networks,
        unusable_networks,
    )
    from e2ediff.monitor.alarm import alarm_blind_spot
    from e2ediff.monitor.probe import chosen_diagnostics
    from e2ediff.monitor.scores import score_problems
    from e2ediff.regularizer import names_of
    from e2ediff.step.count import count
    from e2ediff.train.progress import Progress
    from e2ediff.train.schedule import unreached_rates

    host = load()
    with Progress() as progress:
        read = load_recipe(host, recipe, overrides, progress=progress)
        with progress.doing("building the networks and counting parameters and FLOPs"):
            check_fits(read, recipe)
            found = None if resolved else count(read)
            unusable = [] if resolved else [*unusable_networks(read.objective, "objective")]
            unusable += [] if resolved else score_problems(read)
    if found is None:
        echo(dump_recipe(host, read), lines=True, end="")
        return
    image, latent = read.data.image, found.latent
    grid = f", grid {latent.grid[0]} x {latent.grid[1]}" if latent.grid else ""
    echo(f"recipe      {read.name}: {read.total_images:,} images, {read.total_steps:,} steps")
    shape = f"{image.channels} x {image.height} x {image.width}"
    echo(f"images      {shape} (channels x height x width), {_classes(read)}")
    for line in _listed(read):
        echo(line)
    for place, network in named_networks(read.objective, "objective"):
        if in_a_store(network):
            echo(f"features    {place}: weights in a store, not looked at")
    fixed = "" if latent.learned else ", not learned"
    shape = f"{latent.tokens} tokens x {latent.dim}"
    echo(f"latent      {shape}, norm {latent.norm}{grid}{fixed}")
    echo(f"objective   {host.registries['objectives'].name_of(type(read.objective))}")
    if read.regularizers:
        echo(f"            with {', '.join(names_of(read.regularizers))}")
    echo(f"parameters  {_millions(found.parameters)}  ({found.parameters:,}; trained once,")
    echo("            the averaged copies excluded)")
    for name, size in found.modules.items():
        echo(f"  {name:<28} {size:>14,}  {size / found.parameters:6.1%}")
    for phase, flops in found.flops.items():
        echo(
            f"step        {flops / 1e9:,.2f} GFLOP an image in phase '{phase}', forward and "
            f"backward; {flops * read.batch / 1e12:,.2f} TFLOP a step of {read.batch}"
        )
    state = found.state_bytes
    echo(f"memory      {state / 2**30:.2f} GiB of weights, gradients and averages; activations,")
    echo("            the optimizer, time and disk are forecast by `e2ediff plan`,")
    echo("            a plugin in the repository of e2ediff")
    if read.compile == "auto":
        echo("compile     auto: the run decides at its first step, by the seconds that are left")
    warning = alarm_blind_spot(read, chosen_diagnostics(host, read))
    if warning and latent.learned:
        echo(f"warning: {warning}", err=True)
    warnings = (*idle_guidance(read), *unreached_rates(read))
    for warning in (*warnings, *random_networks(read.objective, "objective")):
        echo(f"warning: {warning}", err=True)
    if unusable:
        raise RecipeError(recipe, unusable)
    echo("ok")


def _listed(read: object) -> Iterator[str]:
    """Yield what a listing of the training images shows, if they are on this machine."""
    import attrs

    from e2ediff.data import left_out_text
    from e2ediff.host.recipe import Recipe
    from e2ediff.loading.classes import empty_classes
    from e2ediff.model.labels import without_images

    assert isinstance(read, Recipe)
    data = read.data
    if any("://" in str(getattr(data, option, "")) for option in data.movable):
        yield "data        in a store, not listed"
        return
    try:
        source = data.open()
    except Exception as error:  # not here, or whatever a plugin's source raises
        yield f"data        not listed: {error}"
        return
    yield f"data        {len(source):,} images"
    if left_out := left_out_text(source.left_out):
        yield f"            {left_out}"
    names = source.class_names or data.image.class_names
    empty = empty_classes(source, data.image)
    image = attrs.evolve(data.image, class_names=tuple(names), empty_classes=empty)
    if warning := without_images(image, empty):
        yield f"            warning: {warning}"


def _classes(read: object) -> str:
    from e2ediff.condition import ClassLabels
    from e2ediff.host.recipe import Recipe

    assert isinstance(read, Recipe)
    image = read.data.image
    if not isinstance(image.conditioning, ClassLabels):
        return image.conditioning.title
    return f"{image.classes:,} classes" if image.classes else "no classes"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"{parameters / 1e6:.2f}M"
