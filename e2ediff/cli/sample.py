"""`e2ediff sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from e2ediff.cli import options
from e2ediff.distributed.signals import keeping
from e2ediff.terminal import echo, echo_path

if TYPE_CHECKING:
    from e2ediff.sample.conditions import SetLaw
    from e2ediff.sample.load import ModelRef


@click.command("sample")
@click.argument("run")
@click.option(
    "--label",
    "names",
    multiple=True,
    metavar="CLASS",
    help="One class by index or name (index:2, name:2), or 'none'; may be repeated. Default: all.",
)
@click.option(
    "--labels",
    "lists",
    multiple=True,
    metavar="LIST",
    help="Classes by index, range or name: --labels 0-9,cat,none; 'all' is every class.",
)
@click.option("--count", type=click.IntRange(1), help="Images per class. Default: 8.")
@click.option(
    "--balanced",
    type=click.IntRange(1),
    metavar="N",
    help="N images that cycle through the classes.",
)
@click.option(
    "--random", "drawn", type=click.IntRange(1), metavar="N", help="N images of random classes."
)
@options.overrides("Another sampler or guidance: --set sampler=heun --set guidance.scale=2.")
@click.option("--steps", type=click.IntRange(1), help="Sampler steps. Default: the recipe's.")
@options.seed
@click.option(
    "--format",
    "kind",
    type=click.Choice(["png", "npz", "zip", "tar"]),
    default="png",
    show_default=True,
    help="A folder of PNGs, ADM's npz, a zip of class folders, or webdataset shards.",
)
@click.option("--out", metavar="DIR", help="Directory or URL. Default: RUN/samples/seed-SEED.")
@click.option("--overwrite", is_flag=True, help="Replace another set of images in --out.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Images stored together; a shard of --format tar.",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Images computed at once; may change an image's last bits.",
)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option(
    "--compile",
    is_flag=True,
    help="Compile the network's blocks, for many images; may change an image's last bits.",
)
@options.processes("Processes that compute, on all GPUs in turn.")
@options.model
@options.threads
@keeping("the stored images are kept, and the same command makes the others")
def command(
    ref: ModelRef,
    names: tuple[str, ...],
    lists: tuple[str, ...],
    count: int | None,
    balanced: int | None,
    drawn: int | None,
    steps: int | None,
    seed: int,
    kind: str,
    out: str | None,
    overwrite: bool,
    batch: int,
    processes: int,
    threads: int | None,
) -> None:
    """Generate images with RUN, the directory that `e2ediff run` printed.

    Writes the images, `grid.png`, and `set.json` with everything that determines them, and
    prints where the images are.
    Image i of a seed is the same in every set that gives it the same class.
    A run that is conditioned on something other than classes takes no --label; its images have
    the conditions of held-out images in order, --count or --balanced of them, by default 64.
    An interrupted command continues where it stopped when it is repeated.
    """
    import attrs

    from e2ediff.host.plugins import load
    from e2ediff.model.labels import label_of, labels_of, lay_out, without_images
    from e2ediff.sample.conditions import numbers_of
    from e2ediff.sample.load import image_of, recipe_of
    from e2ediff.sample.request import SampleRequest
    from e2ediff.sample.sample_set import make_set
    from e2ediff.store.run_directory import RunDirectory
    from e2ediff.train.progress import Progress

    if sum(n is not None for n in (count, balanced, drawn)) > 1:
        raise click.UsageError("give only one of --count, --balanced and --random")
    host = load()
    if steps is not None:
        ref = attrs.evolve(ref, overrides=(*ref.overrides, f"sampler.steps={steps}"))
    directory = RunDirectory.open(ref.run)
    recipe = recipe_of(host, directory, ref.overrides)
    image = image_of(recipe, directory)
    classes = [label_of(image, text) for text in names]
    classes += [k for text in lists for k in labels_of(image, text)]
    kinds = image.conditioning.kinds
    law: SetLaw = "uniform" if drawn else "balanced"
    if kinds is None:
        if drawn is not None:
            raise click.UsageError(
                f"--random: the run is conditioned on {image.conditioning.title}, not on classes; "
                "give --balanced, for conditions of held-out images in order"
            )
        labels, law = numbers_of(recipe, balanced or count or 64, "balanced", seed)
    else:
        classes = classes or list(range(kinds))
        if empty := without_images(image, classes):
            echo(f"warning: {empty}", err=True)
        images = balanced or drawn or len(classes) * (count or 8)
        labels = lay_out(classes, images, "uniform" if drawn else "balanced", seed)
    request = SampleRequest(
        model=ref,
        seed=seed,
        law=law,
        labels=tuple(labels),
        format=kind,  # type: ignore[arg-type]
        out=out or "",
        batch=batch,
    )
    with Progress() as progress:
        place = make_set(
            request,
            host,
            processes=processes,
            threads=threads,
            choose_threads=threads is None,
            overwrite=overwrite,
            say=progress.say,
            update=progress.update,
        )
    echo_path(place)
