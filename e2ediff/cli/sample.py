"""`e2ediff sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from e2ediff.sample.conditions import SetLaw


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
@click.option("--count", type=click.IntRange(1), help="Images a class. Default: 8.")
@click.option(
    "--balanced", type=click.IntRange(1), metavar="N", help="N images, the classes in turn."
)
@click.option(
    "--random", "drawn", type=click.IntRange(1), metavar="N", help="N images of random classes."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Another sampler or guidance: --set sampler=heun --set guidance.scale=2.",
)
@click.option("--steps", type=click.IntRange(1), help="Sampler steps. Default: the recipe's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--weights",
    help="online, target, an average's name, or a width as ema:0.08. Default: for sampling.",
)
@click.option("--checkpoint", help="Name of a checkpoint. Default: the newest.")
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
    help="Images computed at once. Only this may move an image's last bits.",
)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that compute, on all GPUs in turn.",
)
@click.option(
    "--threads",
    default="auto",
    show_default=True,
    metavar="N|auto",
    help="CPU threads of each process; auto: one or all, whichever is faster by timing.",
)
def command(
    run: str,
    names: tuple[str, ...],
    lists: tuple[str, ...],
    count: int | None,
    balanced: int | None,
    drawn: int | None,
    overrides: tuple[str, ...],
    steps: int | None,
    seed: int,
    weights: str | None,
    checkpoint: str | None,
    kind: str,
    out: str | None,
    overwrite: bool,
    batch: int,
    rows: int,
    precision: str,
    device: str,
    processes: int,
    threads: str,
) -> None:
    """Make images with RUN, the directory that `e2ediff run` printed.

    Writes the images, `grid.png`, and `set.json` with everything that decides them, and prints
    where the images lie.
    Image i of a seed is the same in every set that gives it the same class.
    A run that is conditioned on something else than classes has no --label; its images take the
    conditions of held-out images in order, --count or --balanced of them, by default 64.
    A command that was interrupted goes on where it stopped when it is given again.
    """
    from e2ediff.distributed.openmp import prepare_threads

    number = prepare_threads(threads)
    from e2ediff.host.plugins import load
    from e2ediff.model.labels import label_of, labels_of, lay_out
    from e2ediff.sample.conditions import numbers_of
    from e2ediff.sample.load import ModelRef, image_of, recipe_of
    from e2ediff.sample.request import SampleRequest
    from e2ediff.sample.sample_set import make_set
    from e2ediff.store.run_directory import RunDirectory
    from e2ediff.train.progress import Progress

    if sum(n is not None for n in (count, balanced, drawn)) > 1:
        raise click.UsageError("give one of --count, --balanced and --random")
    host = load()
    if steps is not None:
        overrides = (*overrides, f"sampler.steps={steps}")
    directory = RunDirectory.open(run)
    recipe = recipe_of(host, directory, overrides)
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
        images = balanced or drawn or len(classes) * (count or 8)
        labels = lay_out(classes, images, "uniform" if drawn else "balanced", seed)
    request = SampleRequest(
        model=ModelRef(
            run=run,
            weights=weights,
            checkpoint=checkpoint,
            device=device,
            overrides=overrides,
            rows=rows,
            precision=precision,  # type: ignore[arg-type]
        ),
        seed=seed,
        law=law,
        labels=tuple(labels),
        format=kind,  # type: ignore[arg-type]
        out=out or "",
        batch=batch,
    )
    try:
        with Progress() as progress:
            place = make_set(
                request,
                host,
                processes=processes,
                threads=number,
                choose_threads=number is None,
                overwrite=overwrite,
                say=progress.say,
                update=progress.update,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; the images that are stored stay, and the same command makes the others"
        ) from None
    click.echo(place)
