"""`e2ediff reconstruct`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from e2ediff.cli import options
from e2ediff.distributed.signals import keeping
from e2ediff.terminal import echo, echo_path

if TYPE_CHECKING:
    from torch import Tensor

    from e2ediff.sample.load import ModelRef


@click.command("reconstruct")
@click.argument("run")
@click.argument("images", nargs=-1)
@click.option(
    "--count", type=click.IntRange(1), default=64, show_default=True, help="Held-out images."
)
@options.model
@options.threads
@click.option(
    "--out", metavar="DIR", help="Where to write. Default: RUN/samples, or RUN/reconstructions."
)
@keeping("reconstructions that were written stay, and the same command makes all of them again")
def command(
    ref: ModelRef,
    images: tuple[str, ...],
    count: int,
    threads: int | None,
    out: str | None,
) -> None:
    """Pass images through RUN's encoder and decoder.

    IMAGES are files and folders of your own, cropped to the network's size; each reconstruction
    is written to `images/`, and its PSNR to `psnr.json`.
    Without IMAGES, held-out images of the run's data set are used.
    Writes `reconstructions.png`, each of the first 64 images followed by its reconstruction, and
    prints the mean PSNR in decibels and the file.
    """
    import torch

    from e2ediff.distributed.threads import threads_for
    from e2ediff.loading.bad_images import open_source
    from e2ediff.loading.batches import fixed_images
    from e2ediff.model.inference import reconstruct_once
    from e2ediff.monitor.grids import Group, grid_png
    from e2ediff.monitor.pictures import png
    from e2ediff.parts.sources.own_images import list_images, read_images
    from e2ediff.store.known_runs import folder_in, name_of_run
    from e2ediff.store.storage import Store
    from e2ediff.train.progress import Progress

    with Progress() as progress:
        model = ref.load(warn=progress.say)
        own = ("reconstructions", "images") if images else ("samples",)
        store = Store(out or folder_in(ref.run, *own))
        places, size = list_images(images, progress.say), model.rows
        entries: list[dict[str, Any]] = []
        shown: list[Group] = []
        parts: Iterable[Tensor]
        if images:
            starts = range(0, len(places), size)
            parts = (read_images(places[i : i + size], model.recipe.data.image) for i in starts)
        else:
            source, cpu = open_source(model.recipe.data, held_out=True), torch.device("cpu")
            kind, seed = model.image.conditioning, model.recipe.seed
            parts = [fixed_images(source, kind, count, seed, "reconstruct", cpu).x]
        image = model.recipe.data.image
        blank = torch.zeros(size, image.channels, image.height, image.width)
        attempt, fixed = partial(reconstruct_once, model, blank), threads is not None
        exact = model.recipe.deterministic
        with threads_for(
            attempt, progress.say, model.device, fixed=fixed, deterministic=exact
        ) as finished:
            for x in parts:
                x_hat = model.reconstruct(x)
                error = ((x_hat - x) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
                figures = (-10 * error.log10()).tolist()
                pairs = zip(torch.stack([x, x_hat], dim=1), figures, strict=True)
                shown += [Group(pair, f"{psnr:.1f} dB") for pair, psnr in pairs][: 64 - len(shown)]
                for psnr, one in zip(figures, x_hat, strict=True):
                    number = len(entries)
                    entries.append({"number": number, "psnr": psnr})
                    if images:
                        file = f"images/{number:06d}.png"
                        entries[-1] |= {"image": places[number], "file": file}
                        store.write(file, png(one))
                progress.update(f"{len(entries)} images")
                finished(len(entries))
    if images:
        store.write("psnr.json", json.dumps(entries, indent=1).encode())
    mean = sum(entry["psnr"] for entry in entries) / len(entries)
    what = "images" if images else "held-out images"
    caption = (
        f"{name_of_run(ref.run)}: {what}, each followed by its reconstruction; mean PSNR "
        f"{mean:.2f} dB"
    )
    store.write("reconstructions.png", grid_png(shown, caption))
    echo(f"psnr {mean:.2f} dB over {len(entries)} images")
    echo_path(store.where("reconstructions.png"))
