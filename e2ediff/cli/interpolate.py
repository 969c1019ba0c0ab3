"""`e2ediff interpolate`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from e2ediff.cli import options
from e2ediff.terminal import echo_path

if TYPE_CHECKING:
    from e2ediff.sample.load import ModelRef


@click.command("interpolate")
@click.argument("run")
@click.argument("images", nargs=-1)
@click.option("--seeds", nargs=2, type=click.IntRange(0), metavar="A B", help="Two seeds.")
@click.option(
    "--label",
    "names",
    multiple=True,
    metavar="CLASS",
    help="Class by index or name, one strip each. Default: none.",
)
@click.option("--frames", type=click.IntRange(2), default=9, show_default=True)
@options.overrides("Another sampler or guidance: --set sampler.steps=100.")
@options.model
@options.threads
@click.option("--out", metavar="FILE", help="Default: RUN/samples/interpolation-A-B.png.")
def command(
    ref: ModelRef,
    images: tuple[str, ...],
    seeds: tuple[int, int] | None,
    names: tuple[str, ...],
    frames: int,
    threads: int | None,
    out: str | None,
) -> None:
    """Write a strip of images between two seeds, or between two of your own IMAGES.

    Between seeds the noise is interpolated on the sphere, and every frame is sampled.
    Between images the encoder's latents are mixed in equal steps, and every frame is decoded;
    the ends are the images' reconstructions.
    """
    import torch

    from e2ediff.distributed.threads import threads_for
    from e2ediff.model.inference import denoise_once
    from e2ediff.model.labels import without_images
    from e2ediff.monitor.grids import Group, class_title, grid_png
    from e2ediff.parts.sources.own_images import list_images, read_images
    from e2ediff.store.known_runs import folder_in, name_of_run
    from e2ediff.store.storage import Store
    from e2ediff.train.progress import Progress

    if bool(images) == bool(seeds) or len(images) not in (0, 2):
        raise click.UsageError("give --seeds A B, or two images")
    if images and (names or ref.overrides):
        raise click.UsageError("--label and --set concern sampling; images are only decoded")
    with Progress() as progress:
        model = ref.load(warn=progress.say)
        own = "" if out else folder_in(ref.run, "samples")
        if images:
            paths = list_images(images, progress.say)
            if len(paths) != 2:
                raise click.UsageError(f"IMAGES: expected two images, got {len(paths)}")
            z = model.encode(read_images(paths, model.recipe.data.image))
            x = model.decode(
                torch.stack([z[0].lerp(z[1], i / (frames - 1)) for i in range(frames)])
            )
            title, groups = "images", [Group(x, "from image to image")]
        else:
            assert seeds is not None
            labels: list[int | str] = [model.label_of(text) for text in names] or ["index:none"]
            if empty := without_images(model.image, labels):
                progress.say(f"warning: {empty}")
            strips = []
            attempt, fixed = partial(denoise_once, model), threads is not None
            exact = model.recipe.deterministic
            with threads_for(
                attempt, progress.say, model.device, fixed=fixed, deterministic=exact
            ) as finished:
                for label in labels:
                    strips.append(model.interpolate(seeds, label, frames=frames))
                    progress.update(f"{len(strips)}/{len(labels)} strips")
                    finished(len(strips))
            title = f"{seeds[0]}-{seeds[1]}"
            groups = [
                Group(x, class_title(label, model.image))
                for x, label in zip(strips, labels, strict=True)
            ]
    folder, _, name = (out or f"{own}/interpolation-{title}.png").rpartition("/")
    store = Store(folder or ".")
    between = f"seeds {seeds[0]} and {seeds[1]}" if seeds else " and ".join(images)
    store.write(name, grid_png(groups, f"{name_of_run(ref.run)}: between {between}", in_rows=True))
    echo_path(out or store.where(name))
